//! What the tests share.

use crate::Level;

/// The levels of this machine. `TERSOR_REQUIRE`, a comma list such as `avx2,avx512`, names levels
/// without which the tests fail; any other level that is missing is named on stderr.
pub(crate) fn levels() -> Vec<Level> {
    let available = Level::available();
    let required = std::env::var("TERSOR_REQUIRE").unwrap_or_default();
    for name in required.split(',').map(str::trim).filter(|n| !n.is_empty()) {
        // The list also names devices of other crates, which are not ours to judge.
        assert!(
            !matches!(name.parse::<Level>(), Err(crate::LevelError::Missing { .. })),
            "TERSOR_REQUIRE names {name}, which this machine lacks"
        );
    }
    for name in ["avx2", "avx512"] {
        if !available.iter().any(|l| l.name() == name) {
            eprintln!("skipped: level {name} is not available on this machine");
        }
    }
    available
}
