//! SIMD levels. Safety is a value: a level beyond [`Level::Scalar`] carries a token that only
//! detection makes, so a kernel that is given one may use its instructions without asking again,
//! and safe callers cannot ask for what the machine lacks.

use std::fmt;
use std::str::FromStr;

/// Proof that this machine has AVX2, F16C and BMI2. Only [`Level::available`] and its kin make one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Avx2(());

/// Proof that this machine has AVX-512 F, BW, DQ, VL, VBMI, VBMI2, VNNI and GFNI (Ice Lake, Zen 4
/// and later), and all of [`Avx2`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Avx512(());

/// What the kernels may use. Every level gives the same bits; only the time differs. Ordered from
/// the plainest to the widest.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[non_exhaustive]
pub enum Level {
    /// Portable Rust: the oracle of the other levels.
    Scalar,
    /// 256-bit integer SIMD.
    Avx2(Avx2),
    /// 512-bit byte permutes, expands and dot products.
    Avx512(Avx512),
}

/// Why a level could not be had by its name.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LevelError {
    /// No level of that name is known to this build.
    #[error("unknown SIMD level {name:?}: scalar, avx2 and avx512 are known")]
    Unknown {
        /// What was asked for.
        name: String,
    },
    /// The level exists but this machine lacks it.
    #[error("SIMD level {name} is not available on this machine: the best is {best}")]
    Missing {
        /// What was asked for.
        name: &'static str,
        /// The best level of this machine.
        best: Level,
    },
}

const NAMES: [&str; 3] = ["scalar", "avx2", "avx512"];

impl Level {
    /// Every level of this machine, plainest first. Never empty.
    pub fn available() -> Vec<Level> {
        let mut levels = vec![Level::Scalar];
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("f16c")
                && is_x86_feature_detected!("bmi1")
                && is_x86_feature_detected!("bmi2")
                && is_x86_feature_detected!("popcnt");
            let avx512 = avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512vbmi")
                && is_x86_feature_detected!("avx512vbmi2")
                && is_x86_feature_detected!("avx512vnni")
                && is_x86_feature_detected!("gfni");
            if avx2 {
                levels.push(Level::Avx2(Avx2(())));
            }
            if avx512 {
                levels.push(Level::Avx512(Avx512(())));
            }
        }
        levels
    }

    /// The widest level of this machine.
    pub fn best() -> Level {
        *Level::available().last().expect("scalar is always there")
    }

    /// Its name on the command line: `scalar`, `avx2`, `avx512`.
    pub fn name(self) -> &'static str {
        match self {
            Level::Scalar => NAMES[0],
            Level::Avx2(_) => NAMES[1],
            Level::Avx512(_) => NAMES[2],
        }
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Level {
    type Err = LevelError;

    fn from_str(s: &str) -> Result<Level, LevelError> {
        let Some(name) = NAMES.iter().find(|n| **n == s) else {
            return Err(LevelError::Unknown { name: s.to_owned() });
        };
        Level::available().into_iter().find(|l| l.name() == s).ok_or(LevelError::Missing { name, best: Level::best() })
    }
}

/// Defines a public function whose body is compiled once for every level. The body is plain Rust
/// over slices and `[f32; 16]` groups, which the compiler vectorizes with what the level has; it
/// never contracts a multiplication and an addition, so that every level gives the same bits.
macro_rules! per_level {
    ($(#[$meta:meta])* $vis:vis fn $name:ident $([$e:ident: $bound:path])? ($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        $vis fn $name $(<$e: $bound>)? (level: $crate::Level, $($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn body $(<$e: $bound>)? ($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,f16c")]
            #[allow(clippy::too_many_arguments)]
            fn avx2 $(<$e: $bound>)? ($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c")]
            #[allow(clippy::too_many_arguments)]
            fn avx512 $(<$e: $bound>)? ($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }
            match level {
                // SAFETY: the token in the level proves the features that the wrapper enables.
                #[cfg(target_arch = "x86_64")]
                $crate::Level::Avx2(_) => unsafe { avx2($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::Level::Avx512(_) => unsafe { avx512($($arg),*) },
                _ => body($($arg),*),
            }
        }
    };
}
pub(crate) use per_level;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_unknown_names_are_refused() {
        for level in Level::available() {
            assert_eq!(level.name().parse::<Level>(), Ok(level));
        }
        assert_eq!(Level::available()[0], Level::Scalar);
        assert_eq!("sse9".parse::<Level>(), Err(LevelError::Unknown { name: "sse9".into() }));
        assert!(Level::best() >= Level::Scalar);
    }
}
