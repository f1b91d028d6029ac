//! What every runner promises, on every device of this machine: the same bits for the same tokens under every strategy, however the tokens are sliced and
//! whichever sequences share a call.
//!
//! A GPU that is absent is named and passed over, unless `TERSOR_REQUIRE` names `cuda`.

mod residency_common;

use residency_common::{Recipe, TestModel, options};
use tersor_quant::Plan;
use tersor_runtime::device::{self, Device};
use tersor_runtime::model::llama::{Continuation, LogitsOf};
use tersor_runtime::model::runner::Runner;
use tersor_runtime::residency::Strategy;

const CONTEXT: usize = 24;
/// Three sequences: prompts, and what follows them token by token.
const SEQUENCES: [(&[u32], &[u32]); 3] = [(&[3, 98, 41, 0, 7], &[5, 60, 33, 1]), (&[12], &[90, 2, 2, 71]), (&[8, 8, 50], &[17, 4, 96, 0])];

fn devices() -> Vec<Device> {
    let gpus = device::list();
    if gpus.is_empty() {
        let required = std::env::var("TERSOR_REQUIRE").is_ok_and(|list| list.split(',').any(|name| name == "cuda"));
        assert!(!required, "TERSOR_REQUIRE names cuda, and there is no GPU");
        eprintln!("SKIPPED on a GPU: there is none");
    }
    [Device::Cpu].into_iter().chain(gpus.first().map(|gpu| gpu.device)).collect()
}

fn open(model: &TestModel, device: Device, strategy: Strategy) -> Box<dyn Runner> {
    let runner = device::open(model.dir(), model.model(), device, strategy, &options(2));
    runner.unwrap_or_else(|e| panic!("{device} {strategy}: {e}"))
}

/// Fields of four bits without more: what a step in one kernel takes. And symbols that need escapes.
fn recipes() -> [Recipe; 2] {
    [Recipe { plan: Plan::Int4Row, ..Recipe::wide("rans", 3) }, Recipe::wide("rans-pairs", 2)]
}

type Bits = Vec<Vec<u32>>;

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|x| x.to_bits()).collect()
}

/// The rows of logits of each sequence, continued by itself: its prompt in slices of `slice` tokens, then token by token.
fn alone(runner: &mut dyn Runner, slice: usize) -> Vec<Bits> {
    let (vocab, mut row) = (runner.config().vocab, Vec::new());
    let one = |(prompt, steps): (&[u32], &[u32])| {
        let mut kv = runner.new_kv(CONTEXT).unwrap();
        let mut rows = Vec::new();
        for tokens in prompt.chunks(slice).chain(steps.chunks(1)) {
            runner.forward(&mut kv, tokens, LogitsOf::All, &mut row).unwrap();
            rows.extend(row.chunks_exact(vocab).map(bits));
        }
        rows
    };
    SEQUENCES.into_iter().map(one).collect()
}

/// The same with all sequences in every call.
fn together(runner: &mut dyn Runner) -> Vec<Bits> {
    let mut kvs: Vec<_> = SEQUENCES.iter().map(|_| runner.new_kv(CONTEXT).unwrap()).collect();
    let mut rows = vec![Bits::new(); SEQUENCES.len()];
    for call in 0..=SEQUENCES[0].1.len() {
        let tokens = |&(prompt, steps): &(&'static [u32], &'static [u32])| if call == 0 { prompt } else { &steps[call - 1..call] };
        let mut batch: Vec<Continuation<'_>> = kvs
            .iter_mut()
            .zip(&SEQUENCES)
            .map(|(kv, sequence)| Continuation { kv, tokens: tokens(sequence), want: LogitsOf::All })
            .collect();
        runner.forward_batch(&mut batch, &mut |sequence, _, row| rows[sequence].push(bits(row))).unwrap();
    }
    rows
}

/// The first of the greatest.
fn greatest(row: &[f32]) -> Option<u32> {
    (0u32..).zip(row).max_by(|(i, a), (j, b)| a.total_cmp(b).then(j.cmp(i))).map(|(i, _)| i)
}

#[test]
fn strategies_slices_and_company_change_no_bit() {
    for device in devices() {
        for recipe in recipes() {
            let model = TestModel::new(recipe);
            let expected = alone(open(&model, device, Strategy::Fused).as_mut(), usize::MAX);
            assert!(expected[0][0] != expected[0][1] && expected[0] != expected[1], "logits must depend on the input");
            for &strategy in device.strategies() {
                let mut runner = open(&model, device, strategy);
                for slice in [usize::MAX, 2, 1] {
                    assert!(alone(runner.as_mut(), slice) == expected, "{device} {strategy}: prompts in slices of {slice}");
                }
                assert!(together(runner.as_mut()) == expected, "{device} {strategy}: sequences in one call");
                eprintln!("{device}: {}", runner.report().detail);
            }
        }
    }
}

#[test]
fn the_greatest_is_that_of_the_logits() {
    for device in devices() {
        for recipe in recipes() {
            let model = TestModel::new(recipe);
            for &strategy in device.strategies() {
                let mut runner = open(&model, device, strategy);
                let (mut kv, mut other) = (runner.new_kv(CONTEXT).unwrap(), runner.new_kv(CONTEXT).unwrap());
                let (mut token, mut row) = (3, Vec::new());
                for _ in 0..8 {
                    runner.forward(&mut other, &[token], LogitsOf::Last, &mut row).unwrap();
                    assert_eq!(runner.greatest(&mut kv, token).unwrap(), greatest(&row), "{device} {strategy}");
                    token = greatest(&row).unwrap();
                }
            }
        }
    }
}

/// A step in one kernel has numbers of a fixed range; what leaves it is computed by launches, as other strategies do at once. Keys and values saturate.
#[test]
fn large_activations_change_no_bit() {
    for loudness in [64.0, 4096.0] {
        let model = TestModel::new(Recipe { loudness, ..recipes()[0] });
        for device in devices() {
            let expected = alone(open(&model, device, Strategy::Fused).as_mut(), usize::MAX);
            assert!(
                expected.iter().flatten().flatten().all(|&bits| f32::from_bits(bits).is_finite()),
                "{device}: {loudness} gives what is no number"
            );
            let mut runner = open(&model, device, Strategy::Cached);
            assert!(alone(runner.as_mut(), usize::MAX) == expected, "{device}: {loudness}");
            let mut kv = runner.new_kv(CONTEXT).unwrap();
            for (token, row) in SEQUENCES[1].0.iter().chain(SEQUENCES[1].1).zip(&expected[1]) {
                let row: Vec<f32> = row.iter().map(|&bits| f32::from_bits(bits)).collect();
                assert_eq!(runner.greatest(&mut kv, *token).unwrap(), greatest(&row), "{device}: {loudness}");
            }
        }
    }
}
