//! `tersor chat`: a conversation.

use std::io::{BufRead, IsTerminal, Read};
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use tersor_runtime::generate::chat::{ChatTemplate, Message, Role};
use tersor_runtime::generate::session::{Options, Session, Stop};
use tersor_runtime::generate::tokenizer::Tokenizer;

use crate::engine::{Engine, EngineArgs, Opened, Setup};
use crate::interrupt::{self, Interrupted};
use crate::sampling::{SamplingArgs, stream, usage_if_sampling};

/// Positions of the cache unless the user says otherwise, as far as the model was made for them.
pub const CONTEXT_DEFAULT: usize = 4096;
/// Longest line that is read from stdin, bytes.
const LINE_BYTES_MAX: u64 = 1 << 20;

/// Talk with a chat model
///
/// Every line on stdin is a message; replies go to stdout as they are made. /clear begins a new conversation, /exit or the end of stdin ends the command.
/// Ctrl-C ends a reply; between replies it ends the command.
#[derive(clap::Args)]
pub struct Args {
    /// Model directory, with a chat template
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// Instructions before the conversation
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Tokens of a reply at most
    #[arg(short = 'n', long = "tokens", value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..))]
    tokens: u32,
    /// Positions of the KV cache: the whole conversation [default: 4096, or the most that the model was made for]
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    engine: EngineArgs,
}

/// A conversation and all that carries it on.
struct Chat {
    engine: Engine,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    options: Options,
    messages: Vec<Message>,
    /// From the first reply on.
    session: Option<Session>,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let setup = Setup::new(&args.engine)?;
    let opened = Opened::new(&args.directory)?;
    let (tokenizer, template) = (Tokenizer::load(&args.directory)?, ChatTemplate::load(&args.directory)?);
    let context = opened.context(args.context, CONTEXT_DEFAULT)?;
    let sampling = args.sampling.sampling(opened.model.config().repetition_penalty);
    sampling.check().map_err(|error| usage_if_sampling(error.into()))?;
    let options = Options { tokens_max: args.tokens as usize, context, sampling, ignore_eos: false };
    let engine = opened.load(&setup, context, false)?;
    let mut chat = Chat { engine, tokenizer, template, options, messages: Vec::new(), session: None };
    chat.clear(args.system.as_deref());

    let terminal = std::io::stdin().is_terminal();
    let mut stdin = std::io::stdin().lock();
    loop {
        if terminal {
            eprint!("> ");
        }
        let Some(line) = read_line(&mut stdin)? else {
            if terminal {
                eprintln!();
            }
            return Ok(());
        };
        match line.trim() {
            "" => {}
            "/exit" => return Ok(()),
            "/clear" => chat.clear(args.system.as_deref()),
            _ => match chat.reply(line, terminal) {
                // A person can say something else; a script cannot.
                Err(error) if terminal && !error.is::<Interrupted>() && !error.is::<crate::output::StdoutError>() => {
                    eprintln!("{error:#}; /clear begins a new conversation");
                }
                other => other?,
            },
        }
    }
}

impl Chat {
    fn clear(&mut self, system: Option<&str>) {
        self.messages = system.map(|text| Message { role: Role::System, content: text.to_owned() }).into_iter().collect();
    }

    /// Answers a message on stdout. If that fails the message is forgotten.
    fn reply(&mut self, message: String, terminal: bool) -> Result<()> {
        self.messages.push(Message { role: Role::User, content: message });
        match self.answer(terminal) {
            Ok(content) => {
                self.messages.push(Message { role: Role::Assistant, content });
                Ok(())
            }
            Err(error) => {
                self.messages.pop();
                Err(error)
            }
        }
    }

    fn answer(&mut self, terminal: bool) -> Result<String> {
        let prompt = self.tokenizer.encode_rendered(&self.template.render(&self.messages)?)?;
        let runner = self.engine.runner.as_mut();
        let session = match &mut self.session {
            Some(session) => {
                session.restart(&prompt)?;
                session
            }
            none => none.insert(Session::new(runner, &prompt, &self.options)?),
        };
        let graceful = interrupt::graceful();
        let (text, generation) = stream(runner, session, self.tokenizer.detokenizer(&prompt), true)?;
        drop(graceful);
        // Ctrl-C has done its work when it ends a reply that a person reads.
        if interrupt::requested() {
            ensure!(terminal, Interrupted);
            interrupt::forget();
        }
        match generation.stop {
            Stop::Length => eprintln!("(ended after {} tokens; -n allows more)", generation.generated_tokens),
            Stop::ContextFull => eprintln!("(the context of {} tokens is full; /clear begins a new conversation)", self.options.context),
            _ => {}
        }
        Ok(text)
    }
}

/// The next line without its end, or `None` at the end of stdin.
fn read_line(stdin: &mut impl BufRead) -> Result<Option<String>> {
    let mut line = Vec::new();
    stdin.take(LINE_BYTES_MAX + 1).read_until(b'\n', &mut line).context("stdin")?;
    ensure!(line.len() as u64 <= LINE_BYTES_MAX, "stdin: a line of more than {LINE_BYTES_MAX} bytes");
    if line.is_empty() {
        return Ok(None);
    }
    let line = String::from_utf8(line).context("stdin")?;
    Ok(Some(line.trim_end_matches(['\r', '\n']).to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_bounded_and_text() {
        let mut input = &b"one\r\n\ntwo"[..];
        let mut next = || read_line(&mut input).unwrap();
        assert_eq!([next(), next(), next(), next()], [Some("one".to_owned()), Some(String::new()), Some("two".to_owned()), None]);
        assert!(read_line(&mut &b"\xff\n"[..]).is_err());
        let endless = std::io::BufReader::new(std::io::repeat(b'x'));
        assert!(read_line(&mut { endless }).unwrap_err().to_string().contains("bytes"));
    }
}
