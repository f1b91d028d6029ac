//! `tersor serve`: a model behind an HTTP API.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::PathBuf;

use anyhow::{Context, Result};
use tersor_runtime::generate::chat::{ChatError, ChatTemplate};
use tersor_runtime::generate::tokenizer::Tokenizer;
use tersor_server::Service;

use super::chat::CONTEXT_DEFAULT;
use crate::engine::{EngineArgs, Opened, Setup};
use crate::interrupt;
use crate::output::units;

/// Serve a model over HTTP, in the shape of OpenAI's API
///
/// POST /v1/completions and, where the model has a chat template, /v1/chat/completions, both with "stream"; GET /v1/models and /health. Requests that run
/// at the same time move together and share each decoded weight; the next turn of a conversation reuses the cache of the one before. Ctrl-C ends it.
#[derive(clap::Args)]
pub struct Args {
    /// Model directory
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// Address to listen at; whoever reaches it may use the model
    #[arg(long, value_name = "IP", default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    host: IpAddr,
    /// Port to listen at; 0 takes a free one
    #[arg(long, value_name = "N", default_value_t = 8080)]
    port: u16,
    /// What clients call the model [default: the directory's name]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Positions of each sequence, prompt and answer [default: 4096, or the most that the model was made for]
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// Requests that run at a time; each has a KV cache of its own, further ones wait
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=256))]
    sequences: u16,
    #[command(flatten)]
    engine: EngineArgs,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let setup = Setup::new(&args.engine)?;
    let opened = Opened::new(&args.directory)?;
    let tokenizer = Tokenizer::load(&args.directory)?;
    let template = match ChatTemplate::load(&args.directory) {
        Ok(template) => Some(template),
        Err(ChatError::Missing { .. }) => None,
        Err(error) => return Err(error.into()),
    };
    let context = opened.context(args.context, CONTEXT_DEFAULT)?;
    let sequences = usize::from(args.sequences);
    // Before the weights are loaded: a port that is taken shows at once.
    let address = SocketAddr::new(args.host, args.port);
    let listener = TcpListener::bind(address).with_context(|| format!("cannot listen at {address}"))?;
    let address = listener.local_addr().context("the listener has no address")?;
    let name = args.name.clone().unwrap_or_else(|| directory_name(&args.directory));
    let runner = opened.load_for(&setup, context, sequences, false)?.runner;
    let report = runner.report();
    let chat = if template.is_some() { " and chat" } else { "; no chat template" };
    eprintln!(
        "serving {name} at http://{address}/v1: completions{chat}; {sequences} x {context} tokens; {}, weights {}",
        report.strategy,
        units::bytes(report.resident_bytes)
    );
    let _graceful = interrupt::graceful();
    tersor_server::serve(Service { name, runner, tokenizer, template, context, sequences }, listener, interrupt::flag())
        .with_context(|| format!("serving at {address}"))
}

/// The last part of the path, as far as it has one.
fn directory_name(directory: &std::path::Path) -> String {
    let whole = directory.canonicalize().unwrap_or_else(|_| directory.to_owned());
    whole.file_name().map_or_else(|| "tersor".to_owned(), |name| name.to_string_lossy().into_owned())
}
