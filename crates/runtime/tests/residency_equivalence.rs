//! Every strategy gives the same bits as every other, for all schemes and codecs, thread counts, levels and budgets.

mod residency_common;

use residency_common::{Recipe, TestModel, least, options, plans, with_budget, with_policy};
use tersor_codec::Codec;
use tersor_cpu::Level;
use tersor_runtime::residency::{Options, Policy, Strategy};

/// Every strategy with budgets from the least it accepts to none, at 1 and 2 threads.
fn check(recipe: Recipe) {
    let model = TestModel::new(recipe);
    let (expected, _) = model.logits(Strategy::Fused, &Options { level: Level::Scalar, ..options(1) });
    assert!(expected.iter().any(|bits| *bits != expected[0]), "logits must depend on the input");
    for threads in [1, 2] {
        for strategy in Strategy::CPU {
            let options = options(threads);
            let least = least(&model, strategy, &options);
            let policies: &[Policy] = if strategy == Strategy::Lru { &Policy::ALL } else { &[Policy::Pin] };
            for policy in policies {
                for budget in [Some(least), Some(least + least / 5), None] {
                    let options = Options { memory_budget: budget, ..with_policy(&options, *policy) };
                    let (bits, _) = model.logits(strategy, &options);
                    assert!(bits == expected, "{recipe:?}: {strategy} {policy}, {threads} threads, budget {budget:?} differs");
                }
            }
        }
    }
}

#[test]
fn all_schemes() {
    for (i, plan) in plans().into_iter().enumerate() {
        check(Recipe { plan, tied: i % 2 == 1, ..Recipe::new("rans", 2) });
    }
}

#[test]
fn all_codecs() {
    for (i, (name, _)) in Codec::SHORT_NAMES.iter().enumerate() {
        check(Recipe { tied: i % 2 == 0, ..Recipe::new(name, 3) });
    }
}

#[test]
fn matrices_that_are_not_coded() {
    check(Recipe { partly_raw: true, ..Recipe::new("rans", 3) });
    check(Recipe { partly_raw: true, tied: true, ..Recipe::new("huffman", 1) });
}

#[test]
fn every_level() {
    let model = TestModel::new(Recipe::new("rans", 2));
    let (expected, _) = model.logits(Strategy::Cached, &options(2));
    for level in Level::available() {
        for strategy in Strategy::CPU {
            let (bits, _) = model.logits(strategy, &Options { level, ..options(2) });
            assert!(bits == expected, "{level} {strategy}");
        }
    }
}

#[test]
fn prefetch_with_any_number_of_layers() {
    for layers in [1, 2, 3, 5] {
        let model = TestModel::new(Recipe::new("rans", layers));
        let (expected, _) = model.logits(Strategy::Cached, &options(1));
        for threads in [1, 2, 3] {
            let (bits, report) = model.logits(Strategy::Prefetch, &options(threads));
            assert!(bits == expected, "{layers} layers, {threads} threads");
            // 8 passes over all layers; one or two layers are current without ever being asked for again.
            let uses = if layers == 1 { 7 } else { 7 * 8 * layers as u64 };
            assert_eq!(report.hits + report.misses, uses, "{layers} layers");
            assert!(report.decode_hidden_ns + report.decode_exposed_ns > 0);
        }
    }
}

#[test]
fn budgets_bound_what_is_held() {
    let model = TestModel::new(Recipe::new("rans", 4));
    for strategy in Strategy::CPU {
        let options = options(2);
        let least = least(&model, strategy, &options);
        assert!(model.open(strategy, &with_budget(&options, least - 1)).is_err());
        for budget in [least, least + 5_000, least + 30_000, 10 * least] {
            let options = with_budget(&options, budget);
            let plan = tersor_runtime::residency::explain(&model.dir(), strategy, &options).unwrap();
            let (_, report) = model.logits(strategy, &options);
            let promised = plan.footprint.weight_bytes();
            assert!(plan.footprint.total_bytes() <= budget, "{strategy} promises {} of {budget}", plan.footprint.total_bytes());
            let rest = plan.footprint.total_bytes() - promised;
            // These matrices are tiny, so the 64 bytes of padding of each decoded one are counted apart from the 2 %.
            let padding = 2 * 64 * 30;
            assert!(report.resident_bytes + rest <= budget + padding, "{strategy} holds {}", report.resident_bytes);
            let difference = report.resident_bytes.abs_diff(promised);
            assert!(difference <= promised / 50 + padding, "{strategy}: holds {}, promised {promised}", report.resident_bytes);
        }
    }
}
