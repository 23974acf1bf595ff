//! Chooses the instruction set at run time. All variants compute the same bits: each lane is an independent chain of
//! fused multiply-adds, and `f32::mul_add` rounds once everywhere. For bf16 this needs what [`to_bf16`](crate::to_bf16) says
//! of small numbers.

use std::sync::OnceLock;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Variant {
    Portable,
    Avx2,
    Avx512,
    /// That, and two products of bf16 are added at once.
    Avx512Bf16,
}

/// Name of the variant in use: `avx512bf16`, `avx512`, `avx2` or `portable`. The variable `TAPER_KERNELS` asks for a narrower one.
#[must_use]
pub fn variant() -> &'static str {
    match chosen() {
        Variant::Portable => "portable",
        Variant::Avx2 => "avx2",
        Variant::Avx512 => "avx512",
        Variant::Avx512Bf16 => "avx512bf16",
    }
}

/// Whether the processor adds two products of bf16 at once: with an even number of features, the arithmetic of weights in bf16 takes
/// half the time of others.
#[must_use]
pub fn multiplies_pairs() -> bool {
    chosen() == Variant::Avx512Bf16
}

pub(crate) fn chosen() -> Variant {
    static CHOSEN: OnceLock<Variant> = OnceLock::new();
    *CHOSEN.get_or_init(|| match (widest(), std::env::var("TAPER_KERNELS").as_deref()) {
        (_, Ok("portable")) => Variant::Portable,
        (Variant::Avx512 | Variant::Avx512Bf16, Ok("avx2")) => Variant::Avx2,
        (Variant::Avx512Bf16, Ok("avx512")) => Variant::Avx512,
        (widest, _) => widest,
    })
}

#[cfg(target_arch = "x86_64")]
fn widest() -> Variant {
    let avx2 = std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma");
    let avx512 = std::is_x86_feature_detected!("avx512f") && std::is_x86_feature_detected!("avx512vl");
    match (avx2, avx512) {
        (true, true) if adds_products_in_order() => Variant::Avx512Bf16,
        (true, true) => Variant::Avx512,
        (true, false) => Variant::Avx2,
        _ => Variant::Portable,
    }
}

/// Whether two products of bf16 are added one after the other, the upper one first, each sum rounded once. Nothing else is known to be
/// built, but what bits are depends on it.
#[cfg(target_arch = "x86_64")]
fn adds_products_in_order() -> bool {
    // The compiler takes the first to imply the second.
    let is_there = std::is_x86_feature_detected!("avx512bf16") && std::is_x86_feature_detected!("avx512bw");
    // SAFETY: the processor has just been asked for these instruction sets.
    is_there && unsafe { crate::lanes::pairs_are_as_expected() }
}

#[cfg(not(target_arch = "x86_64"))]
fn widest() -> Variant {
    Variant::Portable
}

/// Compiles a function body once per instruction set and picks at run time. With `<V>` after the name, the body has a
/// type `V` of [`Lanes`](crate::lanes::Lanes) for the set.
macro_rules! simd {
    ($(#[$meta:meta])* $vis:vis fn $name:ident ($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $crate::dispatch::simd! { $(#[$meta])* $vis fn $name<V>($($arg: $ty),*) $(-> $ret)? $body }
    };
    ($(#[$meta:meta])* $vis:vis fn $name:ident<V> ($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        $vis fn $name ($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            #[allow(clippy::extra_unused_type_parameters, reason = "not every body names its lanes")]
            fn body<V: $crate::lanes::Lanes> ($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma")]
                fn avx2 ($($arg: $ty),*) $(-> $ret)? {
                    body::<$crate::lanes::Avx2>($($arg),*)
                }
                #[target_feature(enable = "avx512f,avx512vl,avx2,fma")]
                fn avx512 ($($arg: $ty),*) $(-> $ret)? {
                    body::<$crate::lanes::Avx512<false>>($($arg),*)
                }
                match $crate::dispatch::chosen() {
                    // SAFETY: the processor was asked for these instruction sets when the variant was chosen.
                    $crate::dispatch::Variant::Avx512 | $crate::dispatch::Variant::Avx512Bf16 => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    $crate::dispatch::Variant::Avx2 => return unsafe { avx2($($arg),*) },
                    $crate::dispatch::Variant::Portable => {}
                }
            }
            body::<$crate::lanes::Portable>($($arg),*)
        }
    };
}
pub(crate) use simd;
