//! The model's thread: requests wait in a queue, up to a number of them run, and all that run move by one step together.
//!
//! Each place for a request keeps its cache when the request is done. A new request takes the free place whose tokens begin as its prompt does, so that
//! the next turn of a conversation passes only what is new through the model.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use tersor_runtime::generate::session::{self, Options, Session, Stop, TokenScore};
use tersor_runtime::model::Runner;
use tokio::sync::mpsc::UnboundedSender;

/// Requests that may wait; further ones are told to come later.
pub(crate) const QUEUE_MAX: usize = 256;
/// How long a thread without work sleeps before it looks whether it is to end.
const IDLE: Duration = Duration::from_millis(50);

/// What clients want to know about tokens.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scoring {
    /// Likeliest tokens beside each.
    pub top: usize,
    /// Of the prompt, too.
    pub of_prompt: bool,
}

/// A sequence that is to be continued.
pub(crate) struct Job {
    pub prompt: Vec<u32>,
    pub options: Options,
    pub scoring: Option<Scoring>,
    /// Where its events go; once nobody listens it ends. As many events as tokens come, so that the channel is bounded by the context.
    pub events: UnboundedSender<Event>,
}

/// What happens to a job.
#[derive(Debug)]
pub(crate) enum Event {
    /// It runs; so many tokens of the prompt were in a cache.
    Started { cached_tokens: usize },
    /// Scores of the prompt's tokens from the second on.
    Prompt(Vec<TokenScore>),
    /// A generated token.
    Token(u32, Option<TokenScore>),
    /// It is done.
    Done(Stop),
    /// It failed, with the cause in one line.
    Failed(String),
}

/// A place for a request.
#[derive(Default)]
struct Slot {
    /// The last sequence, for its cache.
    session: Option<Session>,
    running: Option<Running>,
    /// When it was last taken, by a count of the jobs.
    taken: u64,
}

/// A job in its place.
struct Running {
    events: UnboundedSender<Event>,
    /// Generated tokens that have been sent.
    sent: usize,
}

/// Owns the model.
pub(crate) struct Scheduler {
    runner: Box<dyn Runner>,
    slots: Vec<Slot>,
    jobs: Receiver<Job>,
    taken: u64,
}

impl Scheduler {
    /// For up to `sequences` jobs at a time, all with the same context; they come by the queue that is returned.
    pub fn new(runner: Box<dyn Runner>, sequences: usize) -> (Self, SyncSender<Job>) {
        let (queue, jobs) = sync_channel(QUEUE_MAX);
        let slots = std::iter::repeat_with(Slot::default).take(sequences.max(1)).collect();
        (Self { runner, slots, jobs, taken: 0 }, queue)
    }

    /// Runs until nobody can send jobs any more, or `stop` is set.
    pub fn run(mut self, stop: &AtomicBool) {
        while self.admit() {
            if stop.load(Ordering::Relaxed) {
                for slot in &mut self.slots {
                    slot.end(Event::Done(Stop::Interrupted));
                }
                // What still comes is answered, until no connection is left.
                continue;
            }
            self.step();
        }
    }

    /// Gives waiting jobs the free places. False if there is none and will be none.
    fn admit(&mut self) -> bool {
        loop {
            let mut running = 0;
            for slot in &mut self.slots {
                slot.running.take_if(|job| job.events.is_closed());
                running += usize::from(slot.running.is_some());
            }
            if running == self.slots.len() {
                return true;
            }
            // Without work there is time to wait for some.
            let patience = if running == 0 { IDLE } else { Duration::ZERO };
            match self.jobs.recv_timeout(patience) {
                Ok(job) => self.start(job),
                Err(RecvTimeoutError::Timeout) => return true,
                Err(RecvTimeoutError::Disconnected) => return running > 0,
            }
        }
    }

    fn start(&mut self, job: Job) {
        let Job { prompt, options, scoring, events } = job;
        let shared = |slot: &Slot| slot.session.as_ref().map_or(0, |session| session.shared_tokens(&prompt));
        // The most that is shared, then a place that holds nothing, then the one that was taken first.
        let free = self.slots.iter_mut().filter(|slot| slot.running.is_none());
        let worth = |slot: &&mut Slot| (shared(slot), slot.session.is_none(), std::cmp::Reverse(slot.taken));
        let slot = free.max_by_key(worth).expect("a place is free");
        let cached_tokens = if scoring.is_some_and(|scoring| scoring.of_prompt) { 0 } else { shared(slot) };
        let runner = self.runner.as_ref();
        let made = match &mut slot.session {
            Some(session) => session.renew(runner, &prompt, &options),
            none => Session::new(runner, &prompt, &options).map(|session| *none = Some(session.without_hash())),
        };
        // That nobody listens any more is noticed when places are given next.
        if let Err(error) = made {
            let _ = events.send(Event::Failed(error.to_string()));
            return;
        }
        let _ = events.send(Event::Started { cached_tokens });
        self.taken += 1;
        slot.taken = self.taken;
        if let (Some(session), Some(Scoring { top, of_prompt })) = (&mut slot.session, scoring) {
            session.score(top, of_prompt);
        }
        slot.running = Some(Running { events, sent: 0 });
    }

    /// Moves all that run.
    fn step(&mut self) {
        let running = self.slots.iter_mut().filter(|slot| slot.running.is_some());
        let mut sessions: Vec<&mut Session> = running.filter_map(|slot| slot.session.as_mut()).collect();
        if sessions.is_empty() {
            return;
        }
        match session::step(self.runner.as_mut(), &mut sessions) {
            Ok(()) => self.slots.iter_mut().for_each(Slot::report),
            Err(error) => {
                for slot in self.slots.iter_mut().filter(|slot| slot.running.is_some()) {
                    slot.end(Event::Failed(error.to_string()));
                    slot.session = None;
                }
            }
        }
    }
}

impl Slot {
    /// Tells what came of the last step.
    fn report(&mut self) {
        let (Some(running), Some(session)) = (&mut self.running, &mut self.session) else { return };
        let mut scores = session.take_scores();
        let new = &session.generated()[running.sent..];
        // The last are the new tokens', if there are any.
        let mut of_tokens = scores.split_off(scores.len().saturating_sub(new.len())).into_iter();
        if !scores.is_empty() {
            let _ = running.events.send(Event::Prompt(scores));
        }
        for &token in new {
            let _ = running.events.send(Event::Token(token, of_tokens.next()));
        }
        running.sent += new.len();
        if let Some(stop) = session.stop() {
            self.end(Event::Done(stop));
        }
    }

    /// Ends what runs here, if anything does, with a last event.
    fn end(&mut self, event: Event) {
        if let Some(running) = self.running.take() {
            let _ = running.events.send(event);
        }
    }
}
