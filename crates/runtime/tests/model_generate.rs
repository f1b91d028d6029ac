//! Sessions and text, on tiny random models.

mod common;

use common::{golden_dir, runner};
use std::fs;
use std::sync::atomic::AtomicBool;
use tersor_cpu::Level;
use tersor_runtime::generate::sampler::Sampling;
use tersor_runtime::generate::session::{Generation, Options, Session, SessionError, Stop, generate, step};
use tersor_runtime::generate::tokenizer::{Tokenizer, TokenizerError};
use tersor_runtime::model::kv::{DeviceKv, KvCache, KvPrecision};
use tersor_runtime::model::llama::{Continuation, LogitsOf};
use tersor_runtime::model::weights::{ResidencyReport, RunError};
use tersor_runtime::model::{CpuRunner, Runner, config::Config};
use xxhash_rust::xxh3::xxh3_64;

fn options(tokens_max: usize) -> Options {
    Options { tokens_max, context: 600, sampling: Sampling::default(), ignore_eos: true }
}

fn run(runner: &mut dyn Runner, session: &mut Session) -> (Generation, Vec<u32>) {
    let mut seen = Vec::new();
    let done = generate(runner, session, &AtomicBool::new(false), &mut |token| seen.push(token)).unwrap();
    assert_eq!(seen, session.generated());
    (done, seen)
}

fn llama3() -> CpuRunner {
    runner(&golden_dir().join("llama3"), Level::best(), 2, KvPrecision::F16)
}

#[test]
fn greedy_generation_is_what_the_forward_pass_says() {
    let mut llama3 = llama3();
    // Two slices of prompt.
    let prompt: Vec<u32> = (0..300).map(|i| (i * 11) % 64).collect();
    let mut session = Session::new(&llama3, &prompt, &options(20)).unwrap();
    let (done, tokens) = run(&mut llama3, &mut session);
    assert_eq!((done.stop, done.prompt_tokens, done.generated_tokens), (Stop::Length, 300, 20));
    assert!(done.prefill.as_nanos() > 0 && done.steps.as_nanos() > 0);
    assert!(done.prefill_tokens_per_second() > 0.0 && done.step_tokens_per_second() > 0.0);

    // The same by hand, the whole sequence at once.
    let sequence: Vec<u32> = prompt.iter().chain(&tokens).copied().collect();
    let mut kv = llama3.new_kv(sequence.len()).unwrap();
    let mut logits = Vec::new();
    llama3.forward(&mut kv, &sequence[..319], LogitsOf::All, &mut logits).unwrap();
    let generated = &logits[299 * 64..];
    let likely: Vec<u32> = generated.chunks(64).map(|row| tersor_cpu::ops::argmax(row) as u32).collect();
    assert_eq!(tokens, likely);
    let bytes: Vec<u8> = generated.iter().flat_map(|x| x.to_le_bytes()).collect();
    assert_eq!(session.logits_hash(), Some(xxh3_64(&bytes)));
    assert_eq!(session.without_hash().logits_hash(), None);

    // Without a hash steps ask for the greatest logit only.
    let mut unhashed = Session::new(&llama3, &prompt, &options(20)).unwrap().without_hash();
    assert_eq!(run(&mut llama3, &mut unhashed).1, tokens);
}

#[test]
fn sessions_in_a_batch_do_what_they_do_alone() {
    let mut llama3 = llama3();
    let prompts: [Vec<u32>; 3] = [vec![1, 2, 3], (0..270).map(|i| i % 64).collect(), vec![60]];
    let sampled = |seed| Options { sampling: Sampling { temperature: 1.0, seed, ..Sampling::default() }, ..options(12) };
    let new = |runner: &CpuRunner, i: usize| Session::new(runner, &prompts[i], &sampled(i as u64)).unwrap();
    let alone: Vec<(Vec<u32>, Option<u64>)> = (0..3)
        .map(|i| {
            let mut session = new(&llama3, i);
            let (_, tokens) = run(&mut llama3, &mut session);
            (tokens, session.logits_hash())
        })
        .collect();
    let mut sessions: Vec<Session> = (0..3).map(|i| new(&llama3, i)).collect();
    while sessions.iter().any(|session| session.stop().is_none()) {
        let mut batch: Vec<&mut Session> = sessions.iter_mut().collect();
        step(&mut llama3, &mut batch).unwrap();
    }
    for (session, (tokens, hash)) in sessions.iter().zip(&alone) {
        assert_eq!((session.generated(), session.logits_hash()), (&tokens[..], *hash));
    }
}

#[test]
fn every_reason_to_stop() {
    let mut llama3 = llama3();
    let mut start = |options: &Options| {
        let mut session = Session::new(&llama3, &[5, 6], options).unwrap();
        run(&mut llama3, &mut session)
    };
    let (done, tokens) = start(&options(0));
    assert_eq!((done.stop, tokens.len()), (Stop::Length, 0));
    // Positions 0..9 hold the prompt and seven tokens; an eighth needs no position of its own until it is continued.
    let (done, tokens) = start(&Options { context: 9, ..options(100) });
    assert_eq!((done.stop, tokens.len()), (Stop::ContextFull, 8));

    // End tokens are 2 and 7. At a high temperature one of them comes soon.
    let hot = Sampling { temperature: 50.0, seed: 1, ..Sampling::default() };
    let (done, tokens) = start(&Options { ignore_eos: false, sampling: hot.clone(), ..options(500) });
    assert_eq!(done.stop, Stop::Eos);
    let (last, before) = tokens.split_last().unwrap();
    assert!([2, 7].contains(last) && !before.contains(&2) && !before.contains(&7), "{tokens:?}");
    let (done, longer) = start(&Options { sampling: hot, ..options(500) });
    assert_eq!(done.stop, Stop::Length);
    assert_eq!(longer[..tokens.len()], tokens, "ignoring the end changes nothing before it");

    let mut session = Session::new(&llama3, &[5, 6], &options(100)).unwrap();
    let flag = AtomicBool::new(false);
    let mut count = 0;
    let done = generate(&mut llama3, &mut session, &flag, &mut |_| {
        count += 1;
        flag.store(count == 3, std::sync::atomic::Ordering::Relaxed);
    });
    assert_eq!((done.unwrap().stop, session.generated().len()), (Stop::Interrupted, 3));
}

#[test]
fn a_restarted_session_goes_on_as_a_new_one_would() {
    let mut llama3 = llama3();
    let mut session = Session::new(&llama3, &[5, 6, 7], &options(6)).unwrap();
    let (_, first) = run(&mut llama3, &mut session);
    let followed: Vec<u32> = [&[5, 6, 7], &first[..], &[9, 9]].concat();
    // A follow-up, another end of the same beginning, a prefix, the same again, something else.
    for prompt in [&followed[..], &[5, 6, 8], &[5, 6], &[5, 6], &[60; 40]] {
        session.restart(prompt).unwrap();
        let (done, tokens) = run(&mut llama3, &mut session);
        let mut fresh = Session::new(&llama3, prompt, &options(6)).unwrap();
        assert_eq!(tokens, run(&mut llama3, &mut fresh).1, "{prompt:?}");
        assert_eq!((done.stop, done.prompt_tokens, done.generated_tokens), (Stop::Length, prompt.len(), 6));
    }
    assert!(matches!(session.restart(&[]), Err(SessionError::EmptyPrompt)));
    assert!(matches!(session.restart(&[1; 600]), Err(SessionError::PromptTooLong { tokens: 600, context: 600 })));
    assert_eq!((session.prompt_tokens(), session.generated().len()), (40, 6), "a refused restart changes nothing");
}

#[test]
fn sessions_that_cannot_begin() {
    let llama3 = llama3();
    let new = |prompt: &[u32], options: &Options| Session::new(&llama3, prompt, options).unwrap_err();
    assert!(matches!(new(&[], &options(1)), SessionError::EmptyPrompt));
    let short = Options { context: 3, ..options(1) };
    assert!(matches!(new(&[1; 3], &short), SessionError::PromptTooLong { tokens: 3, context: 3 }));
    let odd = Options { sampling: Sampling { top_p: 2.0, ..Sampling::default() }, ..options(1) };
    assert_eq!(new(&[1], &odd).to_string(), "top-p 2 is outside above 0 up to 1");
}

#[test]
fn weights_that_are_not_numbers_are_reported() {
    let copy = common::with_config("llama3", |_| {});
    let path = copy.path().join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    // The embedding comes first: its first value becomes a bf16 NaN.
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[8 + header..8 + header + 2].copy_from_slice(&[0xc0, 0x7f]);
    fs::write(&path, bytes).unwrap();
    let mut broken = runner(copy.path(), Level::best(), 1, KvPrecision::F16);
    let mut session = Session::new(&broken, &[5, 6], &options(3)).unwrap();
    let result = generate(&mut broken, &mut session, &AtomicBool::new(false), &mut |_| ());
    assert!(matches!(result, Err(RunError::NotFinite { position: 2 })), "{result:?}");
    // The same where steps ask for the greatest logit only.
    let mut session = Session::new(&broken, &[5], &options(3)).unwrap().without_hash();
    let result = generate(&mut broken, &mut session, &AtomicBool::new(false), &mut |_| ());
    assert!(matches!(result, Err(RunError::NotFinite { position: 1 })), "{result:?}");
}

/// A backend of another kind: the caches of its sequences lie elsewhere, and it always wants the next token.
struct Successor(CpuRunner);

/// The tokens seen.
#[derive(Debug)]
struct Seen(Vec<u32>);

impl DeviceKv for Seen {
    fn bytes(&self) -> u64 {
        4 * self.0.len() as u64
    }
}

impl Runner for Successor {
    fn config(&self) -> &Config {
        self.0.config()
    }

    fn new_kv(&self, capacity: usize) -> Result<KvCache, RunError> {
        Ok(KvCache::on_device(Box::new(Seen(Vec::new())), capacity))
    }

    fn forward_batch(&mut self, batch: &mut [Continuation<'_>], sink: &mut dyn FnMut(usize, usize, &[f32])) -> Result<(), RunError> {
        for (i, sequence) in batch.iter_mut().enumerate() {
            sequence.check(self.0.config().vocab)?;
            sequence.kv.device::<Seen>()?.0.extend(sequence.tokens);
            sequence.kv.advance(sequence.tokens.len());
            let last = sequence.tokens.len() - 1;
            if sequence.want == LogitsOf::Last {
                let mut row = vec![0.0; self.0.config().vocab];
                row[sequence.tokens[last] as usize + 1] = 1.0;
                sink(i, last, &row);
            }
        }
        Ok(())
    }

    fn report(&self) -> ResidencyReport {
        ResidencyReport::default()
    }
}

#[test]
fn sessions_run_on_any_backend_but_only_on_their_own() {
    let (mut cpu, mut other) = (llama3(), Successor(llama3()));
    let mut session = Session::new(&other, &[5, 6], &options(4)).unwrap();
    assert_eq!(run(&mut other, &mut session).1, [7, 8, 9, 10]);
    let on = |made_by: &dyn Runner, runner: &mut dyn Runner| {
        let mut session = Session::new(made_by, &[5, 6], &options(4)).unwrap();
        step(runner, &mut [&mut session])
    };
    assert!(matches!(on(&other, &mut cpu), Err(RunError::ForeignKv)));
    assert!(matches!(on(&cpu, &mut other), Err(RunError::ForeignKv)));
}

fn byte_tokenizer() -> Tokenizer {
    Tokenizer::load(&golden_dir().join("byte-tokenizer")).unwrap()
}

/// Token ids of bytes, as the byte tokenizer gives them, without its beginning token.
fn byte_tokens(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    tokenizer.encode(text).unwrap()[1..].to_vec()
}

#[test]
fn the_tokenizer_adds_its_own_special_tokens_and_hides_them() {
    let tokenizer = byte_tokenizer();
    let tokens = tokenizer.encode("ab é").unwrap();
    assert_eq!((tokens.len(), tokens[0]), (6, 256));
    assert_eq!(tokenizer.decode(&tokens), "ab é");
    assert_eq!(tokenizer.encode("").unwrap(), [256]);
}

#[test]
fn pieces_of_text_are_whole_characters_and_add_up() {
    let tokenizer = byte_tokenizer();
    let text = "Grüße, 世界! 👩‍🚀 ends ".repeat(6);
    let tokens = byte_tokens(&tokenizer, &text);
    // The prompt ends inside the ß: "Grü" is four bytes.
    let mut detokenizer = tokenizer.detokenizer(&tokens[..5]);
    let mut whole = String::new();
    for &token in &tokens[5..] {
        let piece = detokenizer.push(token);
        assert!(!piece.contains(char::REPLACEMENT_CHARACTER), "{piece:?}");
        whole.push_str(&piece);
        assert!(text[4..].starts_with(&whole), "{whole:?}");
    }
    assert_eq!(detokenizer.finish(), "");
    assert_eq!(whole, text[4..]);
}

#[test]
fn bytes_that_are_no_character_are_shown_once_and_do_not_stop_the_text() {
    let tokenizer = byte_tokenizer();
    let lone = byte_tokens(&tokenizer, "é")[1];
    let mut tokens = byte_tokens(&tokenizer, "a");
    tokens.extend(std::iter::repeat_n(lone, 700));
    tokens.extend(byte_tokens(&tokenizer, "bé"));
    tokens.pop();
    let mut detokenizer = tokenizer.detokenizer(&[]);
    let mut whole: String = tokens.iter().map(|&token| detokenizer.push(token)).collect();
    assert!(whole.ends_with('b'), "what may still become a character is held back");
    whole.push_str(&detokenizer.finish());
    assert_eq!(whole, tokenizer.decode(&tokens));
    assert_eq!(detokenizer.finish(), "", "nothing is left");
}

#[test]
fn a_missing_or_broken_tokenizer_is_one_line_that_names_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let missing = Tokenizer::load(dir.path()).unwrap_err();
    assert!(matches!(missing, TokenizerError::Missing { .. }));
    for content in ["", "{", "[]", r#"{"version":"1.0","model":{"type":"BPE"}}"#, "\u{0}\u{1}"] {
        fs::write(dir.path().join("tokenizer.json"), content).unwrap();
        let message = Tokenizer::load(dir.path()).unwrap_err().to_string();
        assert!(message.contains("tokenizer.json: not a tokenizer: ") && !message.contains('\n'), "{message}");
    }
}
