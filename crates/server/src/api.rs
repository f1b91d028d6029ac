//! The routes.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::extract::rejection::JsonRejection;
use axum::extract::{DefaultBodyLimit, State as Extract};
use axum::http::StatusCode;
use axum::response::sse::{self, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures_util::stream::{self, Stream, StreamExt};
use serde_json::{Value, json};
use tersor_runtime::generate::chat::ChatTemplate;
use tersor_runtime::generate::tokenizer::Tokenizer;
use tokio::sync::mpsc::unbounded_channel;

use crate::error::ApiError;
use crate::reply::{Piece, Reply, Usage, logprobs};
use crate::request::{ChatRequest, CompletionRequest, Defaults, Prompt, Wishes};
use crate::scheduler::{Job, QUEUE_MAX};

/// Largest request, bytes.
const BODY_BYTES_MAX: usize = 8 << 20;
/// How often a stream without news shows that it is alive.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// What all requests share.
pub(crate) struct State {
    pub name: String,
    pub tokenizer: Arc<Tokenizer>,
    pub template: Option<ChatTemplate>,
    pub context: usize,
    pub vocab: usize,
    pub repetition_penalty: Option<f32>,
    pub queue: SyncSender<Job>,
}

/// Distinguishes the answers of this process.
static ANSWERS: AtomicU64 = AtomicU64::new(0);

/// The two kinds of answers.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Completion,
    Chat,
}

pub(crate) fn router(state: Arc<State>) -> Router {
    Router::new()
        .route("/health", get(|| async { Json(json!({"status": "ok"})) }))
        .route("/v1/models", get(models))
        .route("/v1/completions", post(completions))
        .route("/v1/chat/completions", post(chat_completions))
        .fallback(|| async {
            ApiError::not_found("no such path; /v1/completions, /v1/chat/completions, /v1/models and /health are served")
        })
        .method_not_allowed_fallback(|| async {
            ApiError { status: StatusCode::METHOD_NOT_ALLOWED, message: "completions are asked for by POST, all else by GET".to_owned() }
        })
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(state)
}

async fn models(Extract(state): Extract<Arc<State>>) -> Json<Value> {
    let model = json!({"id": state.name, "object": "model", "created": 0, "owned_by": "tersor", "context_length": state.context});
    Json(json!({"object": "list", "data": [model]}))
}

async fn completions(
    Extract(state): Extract<Arc<State>>,
    body: Result<Json<CompletionRequest>, JsonRejection>,
) -> Result<Response, ApiError> {
    let Json(request) = body?;
    let (prompts, wishes) = request.check(state.defaults())?;
    let echo = wishes.echo;
    let prepared = blocking(&state, move |state| {
        let prompt = |prompt: Prompt| -> Result<_, ApiError> {
            Ok(match prompt {
                Prompt::Text(text) => (state.tokenizer.encode(&text).map_err(ApiError::bad_request)?, echo.then_some(text)),
                Prompt::Tokens(tokens) => {
                    let text = echo.then(|| state.tokenizer.decode(&tokens));
                    (tokens, text)
                }
            })
        };
        prompts.into_iter().map(prompt).collect::<Result<Vec<_>, _>>()
    });
    answer(&state, Kind::Completion, prepared.await?, wishes).await
}

async fn chat_completions(
    Extract(state): Extract<Arc<State>>,
    body: Result<Json<ChatRequest>, JsonRejection>,
) -> Result<Response, ApiError> {
    let Json(request) = body?;
    let (messages, wishes) = request.check(state.defaults())?;
    let prompt = blocking(&state, move |state| {
        let template = state.template.as_ref();
        let template = template.ok_or_else(|| ApiError::bad_request("the model has no chat template; use /v1/completions"))?;
        let text = template.render(&messages).map_err(ApiError::bad_request)?;
        state.tokenizer.encode_rendered(&text).map_err(ApiError::bad_request)
    });
    answer(&state, Kind::Chat, vec![(prompt.await?, None)], wishes).await
}

/// Work of a moment or more, beside the thread that answers.
async fn blocking<T: Send + 'static>(
    state: &Arc<State>,
    work: impl FnOnce(&State) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let state = state.clone();
    tokio::task::spawn_blocking(move || work(&state)).await.map_err(|_| ApiError::failed("a thread of the server panicked"))?
}

impl State {
    fn defaults(&self) -> Defaults<'_> {
        // Different for every request, but no secret.
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64);
        let seed = now ^ ANSWERS.load(Ordering::Relaxed).rotate_left(32);
        Defaults { name: &self.name, context: self.context, repetition_penalty: self.repetition_penalty.unwrap_or(1.0), seed }
    }

    /// Queues a job. `echo`: the text that is to precede the answer.
    fn submit(&self, prompt: Vec<u32>, echo: Option<String>, wishes: &Wishes) -> Result<Reply, ApiError> {
        let options = wishes.options.clone();
        options.check(&prompt).map_err(ApiError::bad_request)?;
        // One such token would end all that runs beside it.
        if let Some(token) = prompt.iter().find(|token| **token as usize >= self.vocab) {
            return Err(ApiError::bad_request(format!("prompt: token {token} is none of the vocabulary of {}", self.vocab)));
        }
        let (events, receiver) = unbounded_channel();
        let reply = Reply::new(receiver, self.tokenizer.clone(), &prompt, wishes.stops.clone(), echo);
        match self.queue.try_send(Job { prompt, options, scoring: wishes.scoring, events }) {
            Ok(()) => Ok(reply),
            Err(TrySendError::Full(_)) => Err(ApiError::busy(format!("{QUEUE_MAX} requests wait already; try again later"))),
            Err(TrySendError::Disconnected(_)) => Err(ApiError::failed("the model has stopped")),
        }
    }
}

/// Queues the prompts and answers, at once or as a stream.
async fn answer(state: &Arc<State>, kind: Kind, prompts: Vec<(Vec<u32>, Option<String>)>, wishes: Wishes) -> Result<Response, ApiError> {
    let replies: Vec<Reply> = prompts.into_iter().map(|(tokens, echo)| state.submit(tokens, echo, &wishes)).collect::<Result<_, _>>()?;
    let head = Head::new(kind, &state.name);
    if wishes.stream {
        let scored = wishes.scoring.is_some();
        return Ok(streamed(state.tokenizer.clone(), head, replies, scored, wishes.stream_usage).into_response());
    }
    let mut choices = Vec::new();
    let mut usage = Usage::default();
    for (index, mut reply) in replies.into_iter().enumerate() {
        let mut whole = Piece::default();
        while let Some(piece) = reply.next().await {
            let Piece { text, scores, finish } = piece?;
            whole.text += &text;
            whole.scores.extend(scores);
            whole.finish = finish;
        }
        usage = usage.sum(reply.usage);
        let scores = wishes.scoring.map(|_| logprobs(&state.tokenizer, reply.first_token(), &whole.scores, &mut 0));
        choices.push(head.choice(index, &whole, scores));
    }
    let mut body = head.body("");
    body["choices"] = choices.into();
    body["usage"] = usage.json();
    Ok(Json(body).into_response())
}

/// What all parts of an answer begin with.
#[derive(Clone)]
struct Head {
    kind: Kind,
    id: String,
    created: u64,
    model: String,
}

impl Head {
    fn new(kind: Kind, model: &str) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let prefix = if kind == Kind::Chat { "chatcmpl" } else { "cmpl" };
        let id = format!("{prefix}-{:x}-{:x}", now.as_nanos(), ANSWERS.fetch_add(1, Ordering::Relaxed));
        Self { kind, id, created: now.as_secs(), model: model.to_owned() }
    }

    fn body(&self, suffix: &str) -> Value {
        let object = if self.kind == Kind::Chat { format!("chat.completion{suffix}") } else { "text_completion".to_owned() };
        json!({"id": self.id, "object": object, "created": self.created, "model": self.model})
    }

    /// An answer to one prompt.
    fn choice(&self, index: usize, piece: &Piece, scores: Option<Value>) -> Value {
        match self.kind {
            Kind::Completion => choice(index, piece, scores, "text", json!(piece.text)),
            Kind::Chat => choice(index, piece, scores, "message", json!({"role": "assistant", "content": piece.text})),
        }
    }

    /// A part of a stream.
    fn chunk(&self, index: usize, piece: &Piece, scores: Option<Value>, first: bool) -> Value {
        let choice = match self.kind {
            Kind::Completion => self.choice(index, piece, scores),
            Kind::Chat => {
                let delta = match (first, piece.text.as_str()) {
                    (true, text) => json!({"role": "assistant", "content": text}),
                    (false, "") => json!({}),
                    (false, text) => json!({"content": text}),
                };
                choice(index, piece, scores, "delta", delta)
            }
        };
        let mut body = self.body(".chunk");
        body["choices"] = json!([choice]);
        body
    }
}

/// What all choices have, and under `name` what this one says.
fn choice(index: usize, piece: &Piece, scores: Option<Value>, name: &str, says: Value) -> Value {
    json!({"index": index, name: says, "logprobs": scores, "finish_reason": piece.finish})
}

/// One reply of a stream, and what has come of it.
struct Streamed {
    index: usize,
    reply: Reply,
    first: bool,
    /// Bytes of the tokens so far.
    offset: usize,
}

/// Server-sent events: a part of an answer each, then perhaps the usage, then `[DONE]`.
fn streamed(
    tokenizer: Arc<Tokenizer>,
    head: Head,
    replies: Vec<Reply>,
    scored: bool,
    with_usage: bool,
) -> Sse<impl Stream<Item = Result<sse::Event, Infallible>>> {
    let usage = Arc::new(std::sync::Mutex::new(Usage::default()));
    let one = |(index, reply)| {
        let (head, tokenizer, usage) = (head.clone(), tokenizer.clone(), usage.clone());
        Box::pin(stream::unfold(Streamed { index, reply, first: true, offset: 0 }, move |mut state| {
            let (head, tokenizer, usage) = (head.clone(), tokenizer.clone(), usage.clone());
            async move {
                let body = match state.reply.next().await? {
                    Ok(piece) => {
                        let before = if state.first { state.reply.first_token() } else { None };
                        let scores = scored.then(|| logprobs(&tokenizer, before, &piece.scores, &mut state.offset));
                        if piece.finish.is_some() {
                            let mut sum = usage.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                            *sum = sum.sum(state.reply.usage);
                        }
                        head.chunk(state.index, &piece, scores, state.first)
                    }
                    Err(error) => error.body(),
                };
                state.first = false;
                Some((body, state))
            }
        }))
    };
    let parts = stream::select_all(replies.into_iter().enumerate().map(one));
    let last = stream::once(async move {
        let mut body = head.body(".chunk");
        body["choices"] = json!([]);
        body["usage"] = usage.lock().unwrap_or_else(std::sync::PoisonError::into_inner).json();
        body
    });
    let last = last.filter(move |_| std::future::ready(with_usage));
    let done = stream::once(async { "[DONE]".to_owned() });
    let events = parts.chain(last).map(|body| body.to_string()).chain(done);
    Sse::new(events.map(|data| Ok(sse::Event::default().data(data)))).keep_alive(sse::KeepAlive::new().interval(KEEP_ALIVE))
}
