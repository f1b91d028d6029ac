//! Chat templates: how a model wants a conversation written as one text.
//!
//! A template is a Jinja program in the file `chat_template.jinja`, or under the key `chat_template` of `tokenizer_config.json`. It is rendered with the
//! settings and names that transformers gives it. It comes with the model, so it is not trusted: its steps are counted, and it reaches no file.

use super::tokenizer::one_line;
use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, ErrorKind, context};
use serde_json::Value;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Largest file that is read. A `tokenizer_config.json` may list all of a model's added tokens.
const FILE_BYTES_MAX: u64 = 16 << 20;
/// Steps that a template may take: some thousand messages.
const STEPS_MAX: u64 = 10_000_000;
/// Name of the template in its environment.
const NAME: &str = "chat";

/// Who speaks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// Instructions before the conversation.
    System,
    /// The person.
    User,
    /// The model.
    Assistant,
}

impl Role {
    /// As templates call it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
        }
    }
}

/// One turn of a conversation.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said.
    pub content: String,
}

/// Why a conversation cannot be written down.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ChatError {
    /// The model has no template.
    #[error("{}: no chat template (chat_template.jinja, or chat_template in tokenizer_config.json), so this is no chat model; use generate", dir.display())]
    Missing {
        /// The model directory.
        dir: PathBuf,
    },
    /// A file cannot be read or understood.
    #[error("{}: {cause}", file.display())]
    Broken {
        /// The file.
        file: PathBuf,
        /// What is wrong with it, in one line.
        cause: String,
    },
    /// The template refuses the conversation or fails.
    #[error("{}: the chat template fails: {cause}", file.display())]
    Render {
        /// The file that holds the template.
        file: PathBuf,
        /// What it said, in one line.
        cause: String,
    },
}

/// The chat template of a model.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    file: PathBuf,
    bos_token: String,
    eos_token: String,
}

impl ChatTemplate {
    /// Reads the template of the model directory `dir`. The file `chat_template.jinja` comes first; of several named templates the one named
    /// `default` is taken.
    ///
    /// # Errors
    /// A model without a template, a file that is not readable, a template that is no Jinja.
    pub fn load(dir: &Path) -> Result<Self, ChatError> {
        let config_file = dir.join("tokenizer_config.json");
        let config = match read(&config_file)? {
            Some(text) => serde_json::from_str(&text).map_err(|error| broken(&config_file, &error.to_string()))?,
            None => Value::Null,
        };
        let own_file = dir.join("chat_template.jinja");
        let (source, file) = match read(&own_file)? {
            Some(source) => (source, own_file),
            None => {
                let source = in_config(&config["chat_template"]).ok_or_else(|| ChatError::Missing { dir: dir.to_owned() })?;
                (source.to_owned(), config_file)
            }
        };
        let environment = environment(source).map_err(|error| broken(&file, &format!("the chat template is no Jinja: {error}")))?;
        Ok(Self { environment, file, bos_token: special(&config["bos_token"]), eos_token: special(&config["eos_token"]) })
    }

    /// The conversation as one text, with the words that make the model answer at its end. Special tokens are spelled out in it: it goes
    /// through [`Tokenizer::encode_rendered`](super::tokenizer::Tokenizer::encode_rendered).
    ///
    /// # Errors
    /// [`ChatError::Render`] if the template refuses the conversation (two turns of the same speaker, say) or runs for too long.
    pub fn render(&self, messages: &[Message]) -> Result<String, ChatError> {
        let turn = |message: &Message| minijinja::Value::from_pairs([("role", message.role.name()), ("content", message.content.as_str())]);
        let turns = messages.iter().map(turn);
        let template = self.environment.get_template(NAME);
        let text = template.and_then(|template| {
            template.render(context! {
                messages => turns.collect::<minijinja::Value>(),
                bos_token => self.bos_token.as_str(),
                eos_token => self.eos_token.as_str(),
                add_generation_prompt => true,
            })
        });
        text.map_err(|error| ChatError::Render { file: self.file.clone(), cause: one_line(&error.to_string()) })
    }
}

/// Jinja as transformers sets it up: blocks leave no blank lines, strings have Python's methods, and templates may refuse a conversation.
fn environment(source: String) -> Result<Environment<'static>, minijinja::Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_fuel(Some(STEPS_MAX));
    environment.add_function("raise_exception", |cause: String| -> Result<(), minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, cause))
    });
    environment.add_template_owned(NAME, source)?;
    Ok(environment)
}

/// The template itself, or the default one of a list of `{"name", "template"}`.
fn in_config(value: &Value) -> Option<&str> {
    let named = |list: &'_ Vec<Value>| list.iter().position(|entry| entry["name"] == "default");
    match value {
        Value::Array(list) => list[named(list)?]["template"].as_str(),
        other => other.as_str(),
    }
}

/// A special token, written as a string or as an object with its content.
fn special(value: &Value) -> String {
    value.as_str().or_else(|| value["content"].as_str()).unwrap_or_default().to_owned()
}

/// The text of a file, or `None` if there is no such file.
fn read(file: &Path) -> Result<Option<String>, ChatError> {
    let opened = match File::open(file) {
        Ok(opened) => opened,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(broken(file, &error.to_string())),
    };
    let mut text = String::new();
    opened.take(FILE_BYTES_MAX + 1).read_to_string(&mut text).map_err(|error| broken(file, &error.to_string()))?;
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(broken(file, &format!("more than {FILE_BYTES_MAX} bytes")));
    }
    Ok(Some(text))
}

fn broken(file: &Path, cause: &str) -> ChatError {
    ChatError::Broken { file: file.to_owned(), cause: one_line(cause) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::fs;

    /// The pattern of most models: blocks on lines of their own, Python methods, a refusal.
    const TEMPLATE: &str = "{{ bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'system' and not loop.first %}
        {{- raise_exception('system must come first') }}
    {%- endif %}
    {{- '<|' + message.role.upper() + '|>' + message['content'].strip() + eos_token }}
{% endfor %}
{% if add_generation_prompt %}
<|ASSISTANT|>
{%- endif %}";

    fn say(role: Role, content: &str) -> Message {
        Message { role, content: content.to_owned() }
    }

    fn model(config: &Value) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        dir
    }

    #[test]
    fn conversations_are_written_as_transformers_writes_them() {
        // What jinja2 3.1 gives with trim_blocks and lstrip_blocks.
        let expected = "<s><|USER|>a  b</s>\n<|ASSISTANT|>c</s>\n<|USER|>d</s>\n<|ASSISTANT|>";
        let messages = [say(Role::User, " a  b\n"), say(Role::Assistant, "c"), say(Role::User, "d")];
        let named = json!([{"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATE}]);
        for template in [json!(TEMPLATE), named] {
            let dir = model(&json!({"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": template}));
            assert_eq!(ChatTemplate::load(dir.path()).unwrap().render(&messages).unwrap(), expected);
        }
        let dir = model(&json!({"bos_token": null, "chat_template": "not this one"}));
        fs::write(dir.path().join("chat_template.jinja"), TEMPLATE).unwrap();
        assert_eq!(ChatTemplate::load(dir.path()).unwrap().render(&messages[..1]).unwrap(), "<|USER|>a  b\n<|ASSISTANT|>");
    }

    #[test]
    fn what_cannot_be_written_is_one_line_that_names_the_file() {
        let load = |template: Value| ChatTemplate::load(model(&json!({"chat_template": template})).path());
        for absent in [json!(null), json!(3), json!([]), json!([{"name": "tool_use", "template": "x"}])] {
            assert!(matches!(load(absent), Err(ChatError::Missing { .. })));
        }
        let check = |error: ChatError, part: &str| {
            let text = error.to_string();
            assert!(text.contains("tokenizer_config.json") && text.contains(part) && !text.contains('\n'), "{text}");
        };
        check(load(json!("{% if\n%}")).unwrap_err(), "no Jinja");
        let twice = [say(Role::User, "a"), say(Role::System, "b")];
        check(load(json!(TEMPLATE)).unwrap().render(&twice).unwrap_err(), "system must come first");
        check(load(json!("{{ messages[0].nothing.at_all }}")).unwrap().render(&twice).unwrap_err(), "fails");
        let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}";
        check(load(json!(endless)).unwrap().render(&twice).unwrap_err(), "fuel");
        let dir = model(&json!({}));
        fs::write(dir.path().join("tokenizer_config.json"), "{").unwrap();
        check(ChatTemplate::load(dir.path()).unwrap_err(), "EOF");
    }
}
