//! `tokenizer.json`, and text that grows token by token.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Largest `tokenizer.json` that is read. The largest in use (a vocabulary of 262,144) has 33 MB.
const FILE_BYTES_MAX: u64 = 256 << 20;

/// Tokens kept as context when the window of a [`Detokenizer`] moves. Decoders look at neighbours only.
const CONTEXT_TOKENS: usize = 8;

/// Tokens after which the window moves.
const WINDOW_TOKENS: usize = 32;

/// Tokens after which the window moves even though the text does not settle: bytes that never become a character.
const WINDOW_TOKENS_MAX: usize = 256;

/// Why there is no tokenizer, or why it refused a text.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// The directory has no tokenizer.
    #[error("{}: missing; copy the checkpoint's tokenizer.json here", file.display())]
    Missing {
        /// Where it was looked for.
        file: PathBuf,
    },
    /// The file cannot be read or is no tokenizer.
    #[error("{}: {cause}", file.display())]
    Broken {
        /// The file.
        file: PathBuf,
        /// What is wrong with it, in one line.
        cause: String,
    },
    /// The tokenizer refused a text.
    #[error("the tokenizer cannot encode the text: {cause}")]
    Encode {
        /// What it said, in one line.
        cause: String,
    },
}

/// A model's tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
}

impl Tokenizer {
    /// Reads `tokenizer.json` in the model directory `dir`.
    ///
    /// # Errors
    /// A file that is missing, too large or not a tokenizer.
    pub fn load(dir: &Path) -> Result<Self, TokenizerError> {
        let file = dir.join("tokenizer.json");
        let broken = |cause: String| TokenizerError::Broken { file: file.clone(), cause: one_line(&cause) };
        let opened = match File::open(&file) {
            Ok(opened) => opened,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(TokenizerError::Missing { file });
            }
            Err(error) => return Err(broken(error.to_string())),
        };
        let mut bytes = Vec::new();
        opened.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(|error| broken(error.to_string()))?;
        if bytes.len() as u64 > FILE_BYTES_MAX {
            return Err(broken(format!("more than {FILE_BYTES_MAX} bytes")));
        }
        let mut inner = tokenizers::Tokenizer::from_bytes(&bytes).map_err(|error| broken(format!("not a tokenizer: {error}")))?;
        // Settings of training batches; they would silently cut or pad a prompt.
        inner.with_truncation(None).map_err(|error| broken(error.to_string()))?;
        inner.with_padding(None);
        Ok(Self { inner })
    }

    /// Token ids of a text, with the special tokens (a beginning-of-sequence token, say) that the tokenizer's own
    /// post-processor adds.
    ///
    /// # Errors
    /// [`TokenizerError::Encode`] if the tokenizer has no token for a part of the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        self.tokens(text, true)
    }

    /// Token ids of a text that spells out its special tokens, as chat templates write it: none are added.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_rendered(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        self.tokens(text, false)
    }

    fn tokens(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TokenizerError> {
        // `encode_fast` leaves out the offsets, which nobody reads.
        let encoding = self.inner.encode_fast(text, add_special);
        let encoding = encoding.map_err(|error| TokenizerError::Encode { cause: one_line(&error.to_string()) })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of tokens, without special tokens. Bytes that are no UTF-8 become U+FFFD; unknown ids are left out.
    #[must_use]
    pub fn decode(&self, tokens: &[u32]) -> String {
        // Decoders fail only on settings that `load` would have refused.
        self.inner.decode(tokens, true).unwrap_or_default()
    }

    /// Text of tokens that come one by one after `prompt`, whose own text is not repeated.
    #[must_use]
    pub fn detokenizer(&self, prompt: &[u32]) -> Detokenizer<'_> {
        let window = prompt[prompt.len().saturating_sub(CONTEXT_TOKENS)..].to_vec();
        let shown = settled(&self.decode(&window)).to_owned();
        Detokenizer { tokenizer: self, window, shown }
    }
}

/// Gives out the text of a growing token sequence in pieces that are whole characters.
///
/// A character may be spread over several byte tokens, and decoders treat a token at the start of a text differently from
/// one in its middle. So a window of recent tokens is decoded anew for each token, and what is new in its text is given out,
/// less characters that further bytes may still change.
#[derive(Debug)]
pub struct Detokenizer<'a> {
    tokenizer: &'a Tokenizer,
    /// The most recent tokens.
    window: Vec<u32>,
    /// The part of the window's text that has been given out.
    shown: String,
}

impl Detokenizer<'_> {
    /// Takes the next token and returns the text that is now certain; often one word, empty inside a character.
    pub fn push(&mut self, token: u32) -> String {
        self.window.push(token);
        let text = self.tokenizer.decode(&self.window);
        // A decoder may take back text when bytes that formed a character are followed by the first byte of the next.
        let new = settled(&text).strip_prefix(self.shown.as_str()).unwrap_or("").to_owned();
        self.shown.push_str(&new);
        let all_shown = self.shown.len() == text.len();
        if (all_shown && self.window.len() > WINDOW_TOKENS) || self.window.len() > WINDOW_TOKENS_MAX {
            self.window.drain(..self.window.len() - CONTEXT_TOKENS);
            self.shown = settled(&self.tokenizer.decode(&self.window)).to_owned();
        }
        new
    }

    /// Returns what was held back, for the end of the text. Bytes that are no character come as U+FFFD.
    pub fn finish(&mut self) -> String {
        let text = self.tokenizer.decode(&self.window);
        let rest = match text.strip_prefix(self.shown.as_str()) {
            Some(rest) => rest.to_owned(),
            None => char::REPLACEMENT_CHARACTER.to_string(),
        };
        self.shown = text;
        rest
    }
}

/// `text` less the replacement characters at its end that may be the bytes of an unfinished character, which has at most
/// three.
fn settled(text: &str) -> &str {
    let mut settled = text;
    for _ in 0..3 {
        settled = settled.strip_suffix(char::REPLACEMENT_CHARACTER).unwrap_or(settled);
    }
    settled
}

pub(super) fn one_line(cause: &str) -> String {
    cause.split_whitespace().collect::<Vec<_>>().join(" ")
}
