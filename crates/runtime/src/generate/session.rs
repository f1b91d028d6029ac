//! Generation: a session is one sequence, [`step`] moves a batch of them, [`generate`] runs one to its end.

use super::sampler::{Sampler, Sampling, SamplingError};
use crate::eval::log_sum_exp;
use crate::model::kv::KvCache;
use crate::model::llama::{Continuation, LogitsOf, SLICE_TOKENS_MAX};
use crate::model::runner::Runner;
use crate::model::weights::RunError;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use thiserror::Error;
use xxhash_rust::xxh3::Xxh3Default;

/// What a session is to do.
#[derive(Clone, Debug)]
pub struct Options {
    /// Most tokens to generate.
    pub tokens_max: usize,
    /// Positions of the KV cache: prompt and generated tokens together.
    pub context: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Generate past end tokens, for measurements of a fixed length.
    pub ignore_eos: bool,
}

impl Options {
    /// Whether a session could continue `prompt`, as far as can be told without a model.
    ///
    /// # Errors
    /// A prompt that is empty or fills the context, sampling parameters outside their range.
    pub fn check(&self, prompt: &[u32]) -> Result<(), SessionError> {
        check_prompt(prompt, self.context)?;
        Ok(self.sampling.check()?)
    }

    /// The tokens that end a session with `runner`.
    fn eos(&self, runner: &dyn Runner) -> Vec<u32> {
        if self.ignore_eos { Vec::new() } else { runner.config().eos.clone() }
    }
}

/// Why a session of at most `tokens_max` tokens ends before it begins, if it does.
fn at_once(tokens_max: usize) -> Option<Stop> {
    (tokens_max == 0).then_some(Stop::Length)
}

fn check_prompt(prompt: &[u32], context: usize) -> Result<(), SessionError> {
    if prompt.is_empty() {
        return Err(SessionError::EmptyPrompt);
    }
    if prompt.len() >= context {
        return Err(SessionError::PromptTooLong { tokens: prompt.len(), context });
    }
    Ok(())
}

/// Why a session cannot begin.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SessionError {
    /// The prompt has no tokens, so there is nothing to continue.
    #[error("the prompt is empty: it has no tokens")]
    EmptyPrompt,
    /// The prompt leaves no room for a token.
    #[error("the prompt has {tokens} tokens, which leaves no room in a context of {context}")]
    PromptTooLong {
        /// Tokens of the prompt.
        tokens: usize,
        /// Positions of the KV cache.
        context: usize,
    },
    /// A sampling parameter is outside its range.
    #[error(transparent)]
    Sampling(#[from] SamplingError),
    /// The cache cannot be allocated.
    #[error(transparent)]
    Run(#[from] RunError),
}

/// Why a session ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stop {
    /// The model chose an end token.
    Eos,
    /// All the tokens that were asked for are there.
    Length,
    /// The KV cache is full.
    ContextFull,
    /// The stop flag was set.
    Interrupted,
}

/// How likely a token was, before any penalty or temperature.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenScore {
    /// The token.
    pub token: u32,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// The most likely tokens in its place and their logarithms, most likely first; of equals the one with the least id.
    pub top: Vec<(u32, f32)>,
}

impl TokenScore {
    /// From the logits (vocab,) of the token's place; `None` if one of them is not finite or the token is none of the vocabulary.
    fn new(logits: &[f32], token: u32, top: usize) -> Option<Self> {
        let norm = log_sum_exp(logits);
        let logprob = |logit: f32| (f64::from(logit) - norm) as f32;
        let mut best: Vec<(u32, f32)> = Vec::with_capacity(top + 1);
        for (&logit, id) in logits.iter().zip(0..) {
            if best.len() < top || best.last().is_some_and(|(_, least)| logit > *least) {
                best.insert(best.partition_point(|(_, other)| *other >= logit), (id, logit));
                best.truncate(top);
            }
        }
        let own = logprob(*logits.get(token as usize)?);
        own.is_finite().then(|| Self { token, logprob: own, top: best.into_iter().map(|(id, logit)| (id, logprob(logit))).collect() })
    }
}

/// What a session notes of its tokens.
#[derive(Debug)]
struct Scores {
    /// Likeliest tokens that are noted beside each.
    top: usize,
    of_prompt: bool,
    found: Vec<TokenScore>,
}

/// One sequence: its tokens, its cache and its sampler.
pub struct Session {
    kv: KvCache,
    /// Prompt, then generated tokens. Those from `kv.len()` on have not passed through the model yet.
    tokens: Vec<u32>,
    prompt_tokens: usize,
    tokens_max: usize,
    eos: Vec<u32>,
    sampler: Sampler,
    /// Of the logits; `None` if nobody will ask.
    hash: Option<Xxh3Default>,
    scores: Option<Scores>,
    stop: Option<Stop>,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut f = f.debug_struct("Session");
        f.field("tokens", &self.tokens).field("prompt_tokens", &self.prompt_tokens).field("stop", &self.stop);
        f.finish_non_exhaustive()
    }
}

impl Session {
    /// A session in which `runner`, and no other, is to continue `prompt`.
    ///
    /// # Errors
    /// As [`Options::check`], and too little memory.
    pub fn new(runner: &dyn Runner, prompt: &[u32], options: &Options) -> Result<Self, SessionError> {
        options.check(prompt)?;
        Ok(Self {
            sampler: Sampler::new(options.sampling.clone())?,
            kv: runner.new_kv(options.context)?,
            tokens: prompt.to_vec(),
            prompt_tokens: prompt.len(),
            tokens_max: options.tokens_max,
            eos: options.eos(runner),
            hash: Some(Xxh3Default::new()),
            scores: None,
            stop: at_once(options.tokens_max),
        })
    }

    /// Begins anew with another prompt, in the same cache: the first tokens that it shares with the session so far need not pass through the model
    /// again. For the next turn of a conversation. Random numbers and the hash of the logits go on.
    ///
    /// # Errors
    /// A prompt that is empty or fills the context; the session is then as it was.
    pub fn restart(&mut self, prompt: &[u32]) -> Result<(), SessionError> {
        check_prompt(prompt, self.kv.capacity())?;
        self.kv.truncate(self.shared_tokens(prompt));
        self.tokens = prompt.to_vec();
        self.prompt_tokens = prompt.len();
        self.stop = at_once(self.tokens_max);
        Ok(())
    }

    /// As [`restart`](Self::restart), with other options: a new sequence in the same cache, whose positions stay as many as they are. Nothing is hashed
    /// or scored.
    ///
    /// # Errors
    /// As [`Options::check`]; the session is then as it was.
    pub fn renew(&mut self, runner: &dyn Runner, prompt: &[u32], options: &Options) -> Result<(), SessionError> {
        let sampler = Sampler::new(options.sampling.clone())?;
        self.restart(prompt)?;
        (self.sampler, self.eos) = (sampler, options.eos(runner));
        (self.tokens_max, self.stop) = (options.tokens_max, at_once(options.tokens_max));
        (self.hash, self.scores) = (None, None);
        Ok(())
    }

    /// Tokens that `prompt` begins with and that need not pass through the model again if the session goes on with it.
    #[must_use]
    pub fn shared_tokens(&self, prompt: &[u32]) -> usize {
        let shared = self.tokens[..self.kv.len()].iter().zip(prompt).take_while(|(old, new)| old == new).count();
        // The last token passes in any case, for its logits.
        shared.min(prompt.len().saturating_sub(1))
    }

    /// Has the tokens scored that come from now on, with the `top` likeliest beside each; with `of_prompt` also the prompt's, from the second on, all of
    /// which then passes through the model, even where no token is to follow.
    pub fn score(&mut self, top: usize, of_prompt: bool) {
        if of_prompt {
            self.kv.truncate(0);
            self.stop = None;
        }
        self.scores = Some(Scores { top, of_prompt, found: Vec::new() });
    }

    /// The scores since the last call, in the order of the tokens.
    pub fn take_scores(&mut self) -> Vec<TokenScore> {
        self.scores.as_mut().map_or(Vec::new(), |scores| std::mem::take(&mut scores.found))
    }

    /// The tokens generated so far; an end token is the last of them.
    #[must_use]
    pub fn generated(&self) -> &[u32] {
        &self.tokens[self.prompt_tokens..]
    }

    /// Tokens of the prompt.
    #[must_use]
    pub fn prompt_tokens(&self) -> usize {
        self.prompt_tokens
    }

    /// Why the session ended, if it has.
    #[must_use]
    pub fn stop(&self) -> Option<Stop> {
        self.stop
    }

    /// The same without [`logits_hash`](Self::logits_hash), which reads all logits of a token once more.
    #[must_use]
    pub fn without_hash(self) -> Self {
        Self { hash: None, ..self }
    }

    /// xxh3-64 of the little-endian f32 logits, before any penalty or temperature, of every generated token; `None` after
    /// [`without_hash`](Self::without_hash).
    #[must_use]
    pub fn logits_hash(&self) -> Option<u64> {
        self.hash.as_ref().map(Xxh3Default::digest)
    }

    /// The tokens that pass through the model next: at most a slice of the prompt, or the last token.
    fn pending(&self) -> std::ops::Range<usize> {
        let start = self.kv.len();
        start..self.tokens.len().min(start + SLICE_TOKENS_MAX)
    }

    /// The token that passes through the model next, if it is one, and nothing but its greatest logit is asked for.
    fn greatest_follows(&self) -> Option<u32> {
        let [token] = self.tokens[self.kv.len()..] else { return None };
        (self.hash.is_none() && self.scores.is_none() && self.sampler.is_greatest()).then_some(token)
    }

    /// Adds a token that was chosen, unless only the prompt was asked for.
    fn take(&mut self, token: u32) {
        if self.tokens_max == 0 {
            self.scores.as_mut().and_then(|scores| scores.found.pop());
            self.stop = Some(Stop::Length);
            return;
        }
        self.tokens.push(token);
        self.stop = if self.eos.contains(&token) {
            Some(Stop::Eos)
        } else if self.generated().len() >= self.tokens_max {
            Some(Stop::Length)
        } else if self.tokens.len() > self.kv.capacity() {
            // The new token would need one more position to be continued.
            Some(Stop::ContextFull)
        } else {
            None
        };
    }
}

/// Adds the little-endian bytes of a row of logits, in runs: a call for each number would cost more than the numbers.
fn hash_logits(hash: &mut Xxh3Default, logits: &[f32]) {
    const RUN: usize = 1024;
    let mut bytes = [0; 4 * RUN];
    for run in logits.chunks(RUN) {
        for (bytes, logit) in bytes.as_chunks_mut().0.iter_mut().zip(run) {
            *bytes = logit.to_le_bytes();
        }
        hash.update(&bytes[..4 * run.len()]);
    }
}

/// Moves every session that has not ended: by a slice of its prompt, or by one generated token. All share each decoded
/// weight. Ended sessions are left alone.
///
/// # Errors
/// As [`Runner::forward_batch`], and logits that are not finite.
pub fn step(runner: &mut dyn Runner, sessions: &mut [&mut Session]) -> Result<(), RunError> {
    let mut moving: Vec<&mut Session> =
        sessions.iter_mut().map(|session| &mut **session).filter(|session| session.stop.is_none()).collect();
    if let [session] = &mut moving[..]
        && let Some(token) = session.greatest_follows()
    {
        let greatest = runner.greatest(&mut session.kv, token)?;
        session.take(greatest.ok_or(RunError::NotFinite { position: session.tokens.len() })?);
        return Ok(());
    }
    let vocab = runner.config().vocab;
    let mut chosen: Vec<Option<Result<u32, RunError>>> = moving.iter().map(|_| None).collect();
    // What chooses a sequence's next token, beside what computes it.
    let mut choosers = Vec::with_capacity(moving.len());
    let mut batch = Vec::with_capacity(moving.len());
    for session in &mut moving {
        let pending = session.pending();
        let Session { kv, tokens, sampler, hash, scores, .. } = &mut **session;
        let tokens = &tokens[..];
        let want = match scores {
            Some(scores) if scores.of_prompt => LogitsOf::All,
            _ if pending.end == tokens.len() => LogitsOf::Last,
            _ => LogitsOf::None,
        };
        batch.push(Continuation { kv, tokens: &tokens[pending.clone()], want });
        choosers.push((sampler, hash, scores, tokens, pending.start));
    }
    runner.forward_batch(&mut batch, &mut |sequence, index, row| {
        debug_assert_eq!(row.len(), vocab);
        let (sampler, hash, scores, tokens, start) = &mut choosers[sequence];
        if let Some(Err(_)) = chosen[sequence] {
            return;
        }
        // Logits say what follows their token: within the prompt that is known.
        let follows = *start + index + 1;
        let known = tokens.get(follows).copied();
        let mut token = known.or_else(|| sampler.sample(row, tokens)).ok_or(RunError::NotFinite { position: follows });
        if let (Ok(id), Some(scores)) = (&token, scores) {
            match TokenScore::new(row, *id, scores.top) {
                Some(score) => scores.found.push(score),
                None => token = Err(RunError::NotFinite { position: follows }),
            }
        }
        if let (None, Ok(_), Some(hash)) = (known, &token, hash) {
            hash_logits(hash, row);
        }
        if known.is_none() || token.is_err() {
            chosen[sequence] = Some(token);
        }
    })?;
    for (session, token) in moving.into_iter().zip(chosen) {
        if let Some(token) = token {
            session.take(token?);
        }
    }
    Ok(())
}

/// What [`generate`] did, in time.
#[derive(Clone, Copy, Debug)]
pub struct Generation {
    /// Why it ended.
    pub stop: Stop,
    /// From the start to the first generated token.
    pub prefill: Duration,
    /// From the first generated token to the last.
    pub steps: Duration,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Generated tokens.
    pub generated_tokens: usize,
}

impl Generation {
    /// Prompt tokens per second; 0 if nothing was generated.
    #[must_use]
    pub fn prefill_tokens_per_second(&self) -> f64 {
        rate(self.prompt_tokens, self.prefill)
    }

    /// Generated tokens per second. The first is not counted: it comes out of the prefill.
    #[must_use]
    pub fn step_tokens_per_second(&self) -> f64 {
        rate(self.generated_tokens.saturating_sub(1), self.steps)
    }
}

fn rate(tokens: usize, time: Duration) -> f64 {
    if time.is_zero() { 0.0 } else { tokens as f64 / time.as_secs_f64() }
}

/// Runs a session to its end. `on_token` sees every generated token as it comes. If `interrupt` is set meanwhile (by a
/// Ctrl-C handler, say), the session ends after the token or prompt slice in work.
///
/// # Errors
/// As [`step`].
pub fn generate(
    runner: &mut dyn Runner,
    session: &mut Session,
    interrupt: &AtomicBool,
    on_token: &mut dyn FnMut(u32),
) -> Result<Generation, RunError> {
    let start = Instant::now();
    let mut first = None;
    let mut last = start;
    let before = session.generated().len();
    while session.stop.is_none() {
        if interrupt.load(Ordering::Relaxed) {
            session.stop = Some(Stop::Interrupted);
            break;
        }
        let known = session.tokens.len();
        step(runner, &mut [session])?;
        if session.tokens.len() > known {
            last = Instant::now();
            first.get_or_insert(last);
            on_token(session.tokens[known]);
        }
    }
    let first = first.unwrap_or(start);
    Ok(Generation {
        stop: session.stop.expect("the loop ends when there is a reason"),
        prefill: first - start,
        steps: last - first,
        prompt_tokens: session.prompt_tokens,
        generated_tokens: session.generated().len() - before,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_are_log_probabilities_and_name_the_likeliest() {
        // Probabilities 1/8, 1/2, 1/8, 1/4.
        let logits = [0.125_f32, 0.5, 0.125, 0.25].map(|p| p.ln() + 3.0);
        let score = TokenScore::new(&logits, 2, 3).unwrap();
        assert_eq!(score.token, 2);
        assert!((score.logprob - 0.125_f32.ln()).abs() < 1e-6);
        let ids: Vec<u32> = score.top.iter().map(|(id, _)| *id).collect();
        assert_eq!(ids, [1, 3, 0], "of equals the one with the least id");
        assert!((score.top[1].1 - 0.25_f32.ln()).abs() < 1e-6);
        assert_eq!(TokenScore::new(&logits, 0, 0).unwrap().top, []);
        assert_eq!(TokenScore::new(&logits, 0, 9).unwrap().top.len(), 4);
        assert_eq!(TokenScore::new(&logits, 4, 1), None);
        assert_eq!(TokenScore::new(&[0.0, f32::NAN], 0, 1), None);
    }
}
