//! Answers: text from the tokens of a job, as it comes.

use std::sync::Arc;

use serde_json::{Map, Value, json};
use tersor_runtime::generate::session::{Stop, TokenScore};
use tersor_runtime::generate::tokenizer::{TextWindow, Tokenizer};
use tokio::sync::mpsc::UnboundedReceiver;

use crate::error::ApiError;
use crate::scheduler::Event;
use crate::stops::Stops;

/// A part of an answer.
#[derive(Debug, Default)]
pub(crate) struct Piece {
    pub text: String,
    /// Of the tokens that came with it.
    pub scores: Vec<TokenScore>,
    /// Why the answer ends with it, in the API's words.
    pub finish: Option<&'static str>,
}

/// Tokens that were read and made.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Usage {
    pub prompt_tokens: usize,
    pub cached_tokens: usize,
    pub generated_tokens: usize,
}

impl Usage {
    /// That of several answers.
    pub fn sum(self, other: Self) -> Self {
        Self {
            prompt_tokens: self.prompt_tokens + other.prompt_tokens,
            cached_tokens: self.cached_tokens + other.cached_tokens,
            generated_tokens: self.generated_tokens + other.generated_tokens,
        }
    }

    pub fn json(self) -> Value {
        json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.generated_tokens,
            "total_tokens": self.prompt_tokens + self.generated_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        })
    }
}

/// The answer to one prompt, as it grows. Dropped, it ends the job.
pub(crate) struct Reply {
    events: UnboundedReceiver<Event>,
    tokenizer: Arc<Tokenizer>,
    window: TextWindow,
    stops: Stops,
    /// What is given out before all else: the prompt, if it is to be repeated.
    echo: Option<(String, Option<u32>)>,
    pub usage: Usage,
    ended: bool,
}

impl Reply {
    /// To `prompt`, whose `echo` precedes it.
    pub fn new(
        events: UnboundedReceiver<Event>,
        tokenizer: Arc<Tokenizer>,
        prompt: &[u32],
        stops: Vec<String>,
        echo: Option<String>,
    ) -> Self {
        let window = TextWindow::new(&tokenizer, prompt);
        let usage = Usage { prompt_tokens: prompt.len(), ..Usage::default() };
        let echo = echo.map(|text| (text, prompt.first().copied()));
        Self { events, tokenizer, window, stops: Stops::new(stops), echo, usage, ended: false }
    }

    /// The next part; `None` behind the last.
    ///
    /// # Errors
    /// The job failed.
    pub async fn next(&mut self) -> Option<Result<Piece, ApiError>> {
        while !self.ended {
            let Some(event) = self.events.recv().await else {
                self.ended = true;
                return Some(Err(ApiError::failed("the model has stopped")));
            };
            match self.take(event) {
                Ok(piece) if piece.text.is_empty() && piece.scores.is_empty() && piece.finish.is_none() => {}
                Ok(piece) => {
                    self.ended = piece.finish.is_some();
                    return Some(Ok(piece));
                }
                Err(error) => {
                    self.ended = true;
                    return Some(Err(error));
                }
            }
        }
        None
    }

    fn take(&mut self, event: Event) -> Result<Piece, ApiError> {
        let mut piece = Piece::default();
        match event {
            Event::Started { cached_tokens } => self.usage.cached_tokens = cached_tokens,
            Event::Prompt(scores) => {
                piece.text = self.take_echo();
                piece.scores = scores;
            }
            Event::Token(token, score) => {
                self.usage.generated_tokens += 1;
                let text = self.window.push(&self.tokenizer, token);
                let (certain, stopped) = self.stops.push(&text);
                piece.text = self.take_echo() + &certain;
                piece.scores.extend(score);
                piece.finish = stopped.then_some("stop");
            }
            Event::Done(stop) => {
                let rest = self.window.finish(&self.tokenizer);
                let (certain, stopped) = self.stops.push(&rest);
                piece.text = self.take_echo() + &certain;
                if !stopped {
                    piece.text += &self.stops.finish();
                }
                piece.finish = Some(match stop {
                    Stop::Eos => "stop",
                    _ if stopped => "stop",
                    Stop::Length | Stop::ContextFull => "length",
                    Stop::Interrupted => return Err(ApiError::busy("the server is stopping")),
                });
            }
            Event::Failed(cause) => return Err(ApiError::failed(cause)),
        }
        Ok(piece)
    }

    fn take_echo(&mut self) -> String {
        self.echo.as_mut().map_or(String::new(), |(text, _)| std::mem::take(text))
    }

    /// The prompt's first token, which has no score, if the prompt is repeated.
    pub fn first_token(&self) -> Option<u32> {
        self.echo.as_ref().and_then(|(_, first)| *first)
    }
}

/// Scores in the shape of `/v1/completions`: lists of tokens, of logarithms, of the likeliest tokens in each place, and of the bytes before each token in the text
/// of all. `first`: a token before those with scores; `offset`: bytes of the tokens before these, to which theirs are added.
pub(crate) fn logprobs(tokenizer: &Tokenizer, first: Option<u32>, scores: &[TokenScore], offset: &mut usize) -> Value {
    let text = |token: u32| tokenizer.decode(&[token]);
    let (mut tokens, mut own, mut top, mut offsets) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut add = |token: u32, score: Option<&TokenScore>| {
        let token = text(token);
        offsets.push(json!(*offset));
        *offset += token.len();
        tokens.push(json!(token));
        own.push(score.map_or(Value::Null, |score| json!(score.logprob)));
        top.push(score.map_or(Value::Null, |score| likeliest(score, text)));
    };
    if let Some(first) = first {
        add(first, None);
    }
    for score in scores {
        add(score.token, Some(score));
    }
    json!({"tokens": tokens, "token_logprobs": own, "top_logprobs": top, "text_offset": offsets})
}

/// The likeliest tokens by their text. Of tokens with the same text (halves of characters) the likeliest counts; the token itself is always among them.
fn likeliest(score: &TokenScore, text: impl Fn(u32) -> String) -> Value {
    let own = (score.token, score.logprob);
    let mut map = Map::new();
    for (token, logprob) in score.top.iter().copied().chain([own]) {
        map.entry(text(token)).or_insert_with(|| json!(logprob));
    }
    Value::Object(map)
}
