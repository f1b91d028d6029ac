//! Options of the sampler, and text that is streamed as it is generated.

use anyhow::Result;
use tersor_runtime::generate::sampler::Sampling;
use tersor_runtime::generate::session::{self, Generation, Session, SessionError};
use tersor_runtime::generate::tokenizer::Detokenizer;
use tersor_runtime::model::Runner;

use crate::interrupt;
use crate::options::Usage;
use crate::output;

/// How tokens are chosen.
#[derive(clap::Args)]
pub struct SamplingArgs {
    /// Temperature; 0 takes the most likely token
    #[arg(long = "temp", value_name = "T", default_value_t = 0.0, allow_negative_numbers = true)]
    temperature: f32,
    /// Keep the K most likely tokens; 0 keeps all
    #[arg(long, value_name = "K", default_value_t = 0)]
    top_k: usize,
    /// Keep the most likely tokens that reach this probability together
    #[arg(long, value_name = "P", default_value_t = 1.0, allow_negative_numbers = true)]
    top_p: f32,
    /// Keep tokens at least this many times as likely as the most likely one
    #[arg(long, value_name = "P", default_value_t = 0.0, allow_negative_numbers = true)]
    min_p: f32,
    /// Divide the logits of tokens that have occurred; 1 does nothing [default: what the model's generation_config.json advises, or 1]
    #[arg(long, value_name = "R", allow_negative_numbers = true)]
    repeat_penalty: Option<f32>,
    /// Start of the random numbers
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
}

impl SamplingArgs {
    /// For a model that advises a repetition penalty, or none.
    pub fn sampling(&self, advised_penalty: Option<f32>) -> Sampling {
        Sampling {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repeat_penalty.or(advised_penalty).unwrap_or(1.0),
            seed: self.seed,
        }
    }
}

/// An option of the sampler outside its range is a mistake in the command line.
pub fn usage_if_sampling(error: SessionError) -> anyhow::Error {
    match error {
        SessionError::Sampling(error) => Usage(error.to_string()).into(),
        other => other.into(),
    }
}

/// Runs a session to its end and returns the text. With `echo` it goes to stdout as it comes, and generation ends when nobody reads any more.
pub fn stream(
    runner: &mut dyn Runner,
    session: &mut Session,
    mut detokenizer: Detokenizer<'_>,
    echo: bool,
) -> Result<(String, Generation)> {
    let mut text = String::new();
    let mut stdout = Ok(());
    let generation = session::generate(runner, session, interrupt::flag(), &mut |token| {
        let piece = detokenizer.push(token);
        if echo && stdout.is_ok() {
            stdout = output::text(&piece);
            if stdout.is_err() {
                interrupt::request();
            }
        }
        text += &piece;
    })?;
    stdout?;
    let rest = detokenizer.finish();
    text += &rest;
    if echo {
        output::text(&(rest + "\n"))?;
    }
    Ok((text, generation))
}
