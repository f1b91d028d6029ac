//! Serves a model over HTTP, in the shape of OpenAI's API: `/v1/completions`, `/v1/chat/completions`, `/v1/models`, `/health`.
//!
//! - `scheduler` owns the model, on a thread of its own: it takes requests from a queue and moves all that run by one step together, so that they share
//!   each decoded weight.
//! - `request` is what clients send: checked, and turned into prompts and options. What the server does not do is refused by name, never ignored, if it
//!   would change the answer.
//! - `reply` is what they get: text from tokens, at once or piece by piece.
//! - `api` ties them together.
//!
//! Greedy answers are those of `tersor generate`, to the bit, whatever else runs beside them.
#![forbid(unsafe_code)]

mod api;
mod error;
mod reply;
mod request;
mod scheduler;
mod stops;

use std::io;
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tersor_runtime::generate::chat::ChatTemplate;
use tersor_runtime::generate::tokenizer::Tokenizer;
use tersor_runtime::model::Runner;

use api::State;
use scheduler::Scheduler;

/// How often the wish to stop is looked for.
const STOP_POLL: Duration = Duration::from_millis(50);

/// A model, and what is needed to speak with it.
pub struct Service {
    /// What clients call the model.
    pub name: String,
    /// The model.
    pub runner: Box<dyn Runner>,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Its chat template, if it has one.
    pub template: Option<ChatTemplate>,
    /// Positions of each sequence: prompt and answer.
    pub context: usize,
    /// Most requests that run at a time; further ones wait.
    pub sequences: usize,
}

/// Serves until `stop` is set: answers in work then end where they are, and the connections are closed.
///
/// # Errors
/// The listener or the threads fail.
pub fn serve(service: Service, listener: TcpListener, stop: &'static AtomicBool) -> io::Result<()> {
    let Service { name, runner, tokenizer, template, context, sequences } = service;
    let (vocab, repetition_penalty) = (runner.config().vocab, runner.config().repetition_penalty);
    let (scheduler, queue) = Scheduler::new(runner, sequences);
    let state = Arc::new(State { name, tokenizer: Arc::new(tokenizer), template, context, vocab, repetition_penalty, queue });
    let model = std::thread::Builder::new().name("model".to_owned()).spawn(move || scheduler.run(stop))?;
    // Requests are small work beside the model's: one thread, and one for what blocks.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let served = runtime.block_on(async {
        listener.set_nonblocking(true)?;
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let stopped = async move {
            while !stop.load(Ordering::Relaxed) {
                tokio::time::sleep(STOP_POLL).await;
            }
        };
        axum::serve(listener, api::router(state)).with_graceful_shutdown(stopped).await
    });
    drop(runtime);
    // All senders to its queue are gone, so that it ends.
    model.join().map_err(|_| io::Error::other("the thread of the model panicked"))?;
    served
}
