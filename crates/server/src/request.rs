//! What clients send. Every parameter that would change the answer is either obeyed or refused by name; what else a request holds is ignored.

use serde::Deserialize;
use serde_json::{Map, Value};
use tersor_runtime::generate::chat::{Message, Role};
use tersor_runtime::generate::sampler::Sampling;
use tersor_runtime::generate::session::Options;

use crate::error::ApiError;
use crate::scheduler::Scoring;

/// Stop strings of a request at most.
const STOPS_MAX: usize = 16;
/// Prompts of a request at most.
const PROMPTS_MAX: usize = 128;
/// Likeliest tokens beside each that can be asked for.
const TOP_MAX: usize = 20;
/// Tokens of a completion unless the request says otherwise, as OpenAI's API has it.
const COMPLETION_TOKENS_DEFAULT: usize = 16;

/// What both kinds of requests have.
#[derive(Deserialize)]
struct Common {
    model: Option<String>,
    max_tokens: Option<usize>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    seed: Option<i64>,
    stop: Option<OneOrMore>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    // Not of OpenAI's API, but of most servers like this one.
    top_k: Option<usize>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    ignore_eos: Option<bool>,
    // What is refused.
    n: Option<u32>,
    best_of: Option<u32>,
    presence_penalty: Option<f64>,
    frequency_penalty: Option<f64>,
    logit_bias: Option<Map<String, Value>>,
}

#[derive(Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "a string or a list of strings")]
enum OneOrMore {
    One(String),
    More(Vec<String>),
}

/// A prompt: text, or tokens.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(untagged)]
pub(crate) enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "a string, a list of tokens, or a list of either")]
enum Prompts {
    One(Prompt),
    More(Vec<Prompt>),
}

/// The body of `POST /v1/completions`.
#[derive(Deserialize)]
pub(crate) struct CompletionRequest {
    prompt: Prompts,
    echo: Option<bool>,
    logprobs: Option<usize>,
    suffix: Option<String>,
    #[serde(flatten)]
    common: Common,
}

/// The body of `POST /v1/chat/completions`.
#[derive(Deserialize)]
pub(crate) struct ChatRequest {
    messages: Vec<ChatMessage>,
    max_completion_tokens: Option<usize>,
    logprobs: Option<bool>,
    tools: Option<Vec<Value>>,
    response_format: Option<Value>,
    #[serde(flatten)]
    common: Common,
}

#[derive(Deserialize)]
struct ChatMessage {
    role: String,
    content: Content,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "a string or a list of parts")]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Deserialize)]
struct Part {
    #[serde(rename = "type")]
    kind: String,
    text: Option<String>,
}

/// How an answer is made, whatever it answers.
#[derive(Debug)]
pub(crate) struct Wishes {
    /// Checked but for the context.
    pub options: Options,
    pub stops: Vec<String>,
    pub stream: bool,
    /// A last piece of a stream tells the usage.
    pub stream_usage: bool,
    pub scoring: Option<Scoring>,
    /// The prompt precedes the answer.
    pub echo: bool,
}

/// What the server adds to a request, and holds it to.
#[derive(Clone, Copy)]
pub(crate) struct Defaults<'a> {
    pub name: &'a str,
    /// Positions of a sequence.
    pub context: usize,
    /// What the model advises, or 1.
    pub repetition_penalty: f32,
    /// Seed of a request that brings none.
    pub seed: u64,
}

impl CompletionRequest {
    /// The prompts, and how they are to be continued.
    pub fn check(self, defaults: Defaults<'_>) -> Result<(Vec<Prompt>, Wishes), ApiError> {
        refuse("suffix", self.suffix.is_some_and(|suffix| !suffix.is_empty()))?;
        let prompts = match self.prompt {
            Prompts::One(prompt) => vec![prompt],
            Prompts::More(prompts) => prompts,
        };
        if prompts.is_empty() || prompts.len() > PROMPTS_MAX {
            return Err(ApiError::bad_request(format!("prompt: {} prompts, 1 to {PROMPTS_MAX} are possible", prompts.len())));
        }
        let echo = self.echo.unwrap_or(false);
        let mut wishes = self.common.check(defaults, None, COMPLETION_TOKENS_DEFAULT)?;
        if let Some(top) = self.logprobs {
            if top > TOP_MAX {
                return Err(ApiError::bad_request(format!("logprobs: {top}, at most {TOP_MAX} are possible")));
            }
            wishes.scoring = Some(Scoring { top, of_prompt: echo });
        }
        wishes.echo = echo;
        Ok((prompts, wishes))
    }
}

impl ChatRequest {
    /// The conversation, and how it is to be continued.
    pub fn check(self, defaults: Defaults<'_>) -> Result<(Vec<Message>, Wishes), ApiError> {
        refuse("logprobs", self.logprobs == Some(true))?;
        refuse("tools", self.tools.is_some_and(|tools| !tools.is_empty()))?;
        refuse("response_format", self.response_format.is_some_and(|format| !format.is_null() && format["type"] != "text"))?;
        if self.messages.is_empty() {
            return Err(ApiError::bad_request("messages: none, so there is nothing to answer"));
        }
        let wishes = self.common.check(defaults, self.max_completion_tokens, defaults.context)?;
        let messages = self.messages.into_iter().map(ChatMessage::check).collect::<Result<_, _>>()?;
        Ok((messages, wishes))
    }
}

impl ChatMessage {
    fn check(self) -> Result<Message, ApiError> {
        let role = match self.role.as_str() {
            "system" | "developer" => Role::System,
            "user" => Role::User,
            "assistant" => Role::Assistant,
            other => return Err(ApiError::bad_request(format!("messages: role {other:?} is not supported"))),
        };
        let content = match self.content {
            Content::Text(text) => text,
            Content::Parts(parts) => parts.into_iter().map(Part::text).collect::<Result<_, _>>()?,
        };
        Ok(Message { role, content })
    }
}

impl Part {
    fn text(self) -> Result<String, ApiError> {
        match (self.kind.as_str(), self.text) {
            ("text", Some(text)) => Ok(text),
            (kind, _) => Err(ApiError::bad_request(format!("messages: content of type {kind:?} is not supported"))),
        }
    }
}

impl Common {
    fn check(self, defaults: Defaults<'_>, tokens_max: Option<usize>, tokens_default: usize) -> Result<Wishes, ApiError> {
        if let Some(model) = self.model.filter(|model| model != defaults.name) {
            return Err(ApiError::not_found(format!("model: {model:?} is not here, {:?} is", defaults.name)));
        }
        refuse("n above 1", self.n.is_some_and(|n| n != 1))?;
        refuse("best_of above 1", self.best_of.is_some_and(|n| n != 1))?;
        refuse("presence_penalty", self.presence_penalty.is_some_and(|penalty| penalty != 0.0))?;
        refuse("frequency_penalty", self.frequency_penalty.is_some_and(|penalty| penalty != 0.0))?;
        refuse("logit_bias", self.logit_bias.is_some_and(|bias| !bias.is_empty()))?;
        let stops = match self.stop {
            None => Vec::new(),
            Some(OneOrMore::One(stop)) => vec![stop],
            Some(OneOrMore::More(stops)) => stops,
        };
        if stops.len() > STOPS_MAX || stops.iter().any(String::is_empty) {
            return Err(ApiError::bad_request(format!("stop: up to {STOPS_MAX} strings are possible, none of them empty")));
        }
        let sampling = Sampling {
            temperature: self.temperature.unwrap_or(1.0),
            top_k: self.top_k.unwrap_or(0),
            top_p: self.top_p.unwrap_or(1.0),
            min_p: self.min_p.unwrap_or(0.0),
            repetition_penalty: self.repetition_penalty.unwrap_or(defaults.repetition_penalty),
            seed: self.seed.map_or(defaults.seed, i64::cast_unsigned),
        };
        sampling.check().map_err(ApiError::bad_request)?;
        let tokens_max = tokens_max.or(self.max_tokens).unwrap_or(tokens_default).min(defaults.context);
        Ok(Wishes {
            options: Options { tokens_max, context: defaults.context, sampling, ignore_eos: self.ignore_eos.unwrap_or(false) },
            stops,
            stream: self.stream.unwrap_or(false),
            stream_usage: self.stream_options.and_then(|options| options.include_usage).unwrap_or(false),
            scoring: None,
            echo: false,
        })
    }
}

fn refuse(what: &str, asked: bool) -> Result<(), ApiError> {
    if asked { Err(ApiError::bad_request(format!("{what} is not supported"))) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const DEFAULTS: Defaults<'_> = Defaults { name: "m", context: 100, repetition_penalty: 1.1, seed: 7 };

    fn completion(body: Value) -> Result<(Vec<Prompt>, Wishes), String> {
        let request: CompletionRequest = serde_json::from_value(body).map_err(|error| error.to_string())?;
        request.check(DEFAULTS).map_err(|error| error.message)
    }

    fn chat(body: Value) -> Result<(Vec<Message>, Wishes), String> {
        let request: ChatRequest = serde_json::from_value(body).map_err(|error| error.to_string())?;
        request.check(DEFAULTS).map_err(|error| error.message)
    }

    #[test]
    fn prompts_are_texts_or_tokens_one_or_many() {
        let prompts = |prompt: Value| completion(json!({"prompt": prompt})).map(|(prompts, _)| prompts);
        let text = |text: &str| Prompt::Text(text.to_owned());
        assert_eq!(prompts(json!("a")), Ok(vec![text("a")]));
        assert_eq!(prompts(json!([1, 2])), Ok(vec![Prompt::Tokens(vec![1, 2])]));
        assert_eq!(prompts(json!(["a", "b"])), Ok(vec![text("a"), text("b")]));
        assert_eq!(prompts(json!([[1], [2, 3]])), Ok(vec![Prompt::Tokens(vec![1]), Prompt::Tokens(vec![2, 3])]));
        for bad in [json!(3), json!({"a": 1}), json!([-1]), json!(vec!["a"; PROMPTS_MAX + 1])] {
            assert!(prompts(bad.clone()).is_err(), "{bad}");
        }
    }

    #[test]
    fn defaults_are_those_of_the_api_and_of_the_model() {
        let (_, wishes) = completion(json!({"prompt": "a"})).unwrap();
        assert_eq!((wishes.options.tokens_max, wishes.options.sampling.temperature), (COMPLETION_TOKENS_DEFAULT, 1.0));
        assert_eq!((wishes.options.sampling.repetition_penalty, wishes.options.sampling.seed), (1.1, 7));
        let (messages, wishes) = chat(json!({"messages": [{"role": "user", "content": "a"}], "seed": -1, "max_tokens": 5000})).unwrap();
        assert_eq!((wishes.options.tokens_max, wishes.options.sampling.seed, messages.len()), (100, u64::MAX, 1));
    }

    #[test]
    fn content_may_come_in_parts() {
        let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
        let (messages, _) = chat(json!({"messages": [{"role": "developer", "content": parts}]})).unwrap();
        assert_eq!(messages, [Message { role: Role::System, content: "ab".to_owned() }]);
    }

    #[test]
    fn what_would_change_the_answer_is_obeyed_or_refused_by_name() {
        let refused = |extra: Value| {
            let mut body = json!({"prompt": "a", "user": "ignored"});
            body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
            completion(body).map(|_| ()).unwrap_err()
        };
        for (extra, word) in [
            (json!({"model": "other"}), "model"),
            (json!({"n": 2}), "n above 1"),
            (json!({"best_of": 3}), "best_of"),
            (json!({"presence_penalty": 0.5}), "presence_penalty"),
            (json!({"frequency_penalty": -0.5}), "frequency_penalty"),
            (json!({"logit_bias": {"5": 1}}), "logit_bias"),
            (json!({"suffix": "b"}), "suffix"),
            (json!({"logprobs": 21}), "logprobs"),
            (json!({"stop": ""}), "stop"),
            (json!({"stop": vec!["a"; 17]}), "stop"),
            (json!({"temperature": -1}), "temperature"),
            (json!({"top_p": 0}), "top-p"),
            (json!({"prompt": vec!["a"; PROMPTS_MAX + 1]}), "prompt"),
        ] {
            let message = refused(extra.clone());
            assert!(message.contains(word) && !message.contains('\n'), "{extra}: {message}");
        }
        let nothing = json!({"prompt": "a", "n": 1, "presence_penalty": 0, "logit_bias": {}, "suffix": null, "stop": null, "seed": null});
        assert!(completion(nothing).is_ok());
        let user = json!([{"role": "user", "content": "a"}]);
        for (body, word) in [
            (json!({"messages": []}), "messages"),
            (json!({"messages": [{"role": "tool", "content": "a"}]}), "tool"),
            (json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}), "image_url"),
            (json!({"messages": user, "tools": [{}]}), "tools"),
            (json!({"messages": user, "logprobs": true}), "logprobs"),
            (json!({"messages": user, "response_format": {"type": "json_object"}}), "response_format"),
        ] {
            let message = chat(body.clone()).map(|_| ()).unwrap_err();
            assert!(message.contains(word), "{body}: {message}");
        }
    }
}
