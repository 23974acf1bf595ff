//! Sixteen floats that are computed together, in registers of each instruction set. Every operation acts on each lane
//! alone and rounds once a product, so that all sets give the same bits.

use crate::matrix::round_bits;

/// Sixteen lanes.
pub(crate) trait Lanes: Copy {
    /// Rows and panels of the largest tile of a product whose accumulators stay in registers.
    const TILE: (usize, usize);
    /// Rows of the largest tile that widens bf16, which takes registers of its own.
    const TILE_BF16: usize;
    fn splat(value: f32) -> Self;
    fn load(from: &[f32; 16]) -> Self;
    /// Sixteen bf16 of a step that stands alone.
    fn load_bf16(from: &[u16; 16]) -> Self;
    /// Two bf16 in each lane.
    fn load_pairs(from: &[[u16; 2]; 16]) -> Self;
    /// The upper bf16 of each lane: a mask widens it.
    fn upper(self) -> Self;
    /// The lower one: a shift widens it.
    fn lower(self) -> Self;
    /// Of two steps that take turns, lane by lane, the first, in the upper halves.
    #[inline(always)]
    fn load_bf16_even(from: &[u16; 32]) -> Self {
        Self::load_pairs(pairs(from)).upper()
    }
    /// The second.
    #[inline(always)]
    fn load_bf16_odd(from: &[u16; 32]) -> Self {
        Self::load_pairs(pairs(from)).lower()
    }
    fn store(self, to: &mut [f32; 16]);
    /// `self * factor + addend`, rounded once.
    fn mul_add(self, factor: Self, addend: Self) -> Self;
    /// The product of the upper bf16 of each lane added, then that of the lower ones, rounded each time.
    #[inline(always)]
    fn mul_add_pairs(self, factor: Self, addend: Self) -> Self {
        one_by_one(self, factor, addend)
    }
    /// Asks for a cache line that is read soon; any address will do.
    fn prefetch(_at: *const u8) {}
}

/// What stands in the lanes of two steps that take turns.
#[inline(always)]
fn pairs(steps: &[u16; 32]) -> &[[u16; 2]; 16] {
    let Ok(pairs) = steps.as_chunks().0.try_into() else { unreachable!("32 numbers are 16 pairs") };
    pairs
}

/// [`Lanes::mul_add_pairs`] where the processor knows single products only.
#[inline(always)]
fn one_by_one<V: Lanes>(x: V, factor: V, addend: V) -> V {
    x.lower().mul_add(factor.lower(), x.upper().mul_add(factor.upper(), addend))
}

/// What a tile reads of a weight in each lane of a step.
pub(crate) trait Element: Copy + Sync {
    /// Whether the lanes of two steps take turns, so that steps have to stand beside each other.
    const TAKES_TURNS: bool;
    /// Numbers of x that a step multiplies.
    const NUMBERS: usize = 1;
    /// Whether x is read as [`narrow`](Self::narrow) leaves it.
    const NARROWS: bool = true;
    /// Steps of a row of x, a float each, rounded as what they are multiplied with.
    fn narrow(x: &[f32], to: &mut [f32]);
    /// The same of a step of some rows, whose numbers stand `x_step` apart.
    #[inline(always)]
    fn narrow_rows<const N: usize>(x: &[f32], _x_step: usize, to: &mut [f32; N]) {
        Self::narrow(&x[..N], to);
    }
    /// `x * w + sum`.
    #[inline(always)]
    fn mul_add<V: Lanes>(x: V, w: V, sum: V) -> V {
        x.mul_add(w, sum)
    }
    /// Rows of the largest tile.
    #[inline(always)]
    fn tile_rows<V: Lanes>() -> usize {
        V::TILE.0
    }
    /// A step; where lanes take turns, the last one of an odd number.
    fn lanes<V: Lanes>(from: &[Self; 16]) -> V;
    /// The first of two steps of a panel.
    #[inline(always)]
    fn even<V: Lanes>(from: &[Self; 32]) -> V {
        Self::lanes(&from.as_chunks().0[0])
    }
    /// The second.
    #[inline(always)]
    fn odd<V: Lanes>(from: &[Self; 32]) -> V {
        Self::lanes(&from.as_chunks().0[1])
    }
}

impl Element for f32 {
    const TAKES_TURNS: bool = false;
    const NARROWS: bool = false;
    #[inline(always)]
    fn narrow(x: &[f32], to: &mut [f32]) {
        to.copy_from_slice(x);
    }
    #[inline(always)]
    fn lanes<V: Lanes>(from: &[Self; 16]) -> V {
        V::load(from)
    }
}

/// The upper half of a float.
impl Element for u16 {
    const TAKES_TURNS: bool = true;
    #[inline(always)]
    fn narrow(x: &[f32], to: &mut [f32]) {
        // A loop, not an iterator's closure: that would not be compiled for the instruction set.
        for (x, to) in x.iter().zip(to) {
            *to = f32::from_bits(round_bits(*x));
        }
    }
    #[inline(always)]
    fn tile_rows<V: Lanes>() -> usize {
        V::TILE_BF16
    }
    #[inline(always)]
    fn lanes<V: Lanes>(from: &[Self; 16]) -> V {
        V::load_bf16(from)
    }
    #[inline(always)]
    fn even<V: Lanes>(from: &[Self; 32]) -> V {
        V::load_bf16_even(from)
    }
    #[inline(always)]
    fn odd<V: Lanes>(from: &[Self; 32]) -> V {
        V::load_bf16_odd(from)
    }
}

/// Two steps of bf16, which some processors multiply at once. What holds floats elsewhere holds pairs here.
impl Element for [u16; 2] {
    const TAKES_TURNS: bool = false;
    const NUMBERS: usize = 2;
    #[inline(always)]
    fn tile_rows<V: Lanes>() -> usize {
        V::TILE_BF16
    }
    #[inline(always)]
    fn narrow(x: &[f32], to: &mut [f32]) {
        for (x, to) in x.as_chunks().0.iter().zip(to) {
            *to = pair(*x);
        }
    }
    #[inline(always)]
    fn narrow_rows<const N: usize>(x: &[f32], x_step: usize, to: &mut [f32; N]) {
        let rows = x[..N].iter().zip(&x[x_step..][..N]);
        for ((first, second), to) in rows.zip(to) {
            *to = pair([*first, *second]);
        }
    }
    #[inline(always)]
    fn mul_add<V: Lanes>(x: V, w: V, sum: V) -> V {
        x.mul_add_pairs(w, sum)
    }
    #[inline(always)]
    fn lanes<V: Lanes>(from: &[Self; 16]) -> V {
        V::load_pairs(from)
    }
}

/// Two numbers rounded to bf16, the first in the upper half.
#[inline(always)]
fn pair([first, second]: [f32; 2]) -> f32 {
    f32::from_bits(round_bits(first) | round_bits(second) >> 16)
}

/// Steps of a panel as floats, of the same length: pairs, and the last one of an odd number.
#[inline(always)]
pub(crate) fn widen<V: Lanes, E: Element>(from: &[E], to: &mut [f32]) {
    assert_eq!(from.len(), to.len(), "steps to widen");
    let ((pairs, last), (to, to_last)) = (from.as_chunks(), to.as_chunks_mut::<32>());
    for (pair, to) in pairs.iter().zip(to) {
        let to = to.as_chunks_mut().0;
        E::even::<V>(pair).store(&mut to[0]);
        E::odd::<V>(pair).store(&mut to[1]);
    }
    for (step, to) in last.as_chunks().0.iter().zip(to_last.as_chunks_mut().0) {
        E::lanes::<V>(step).store(to);
    }
}

/// For any processor.
#[derive(Clone, Copy)]
pub(crate) struct Portable([f32; 16]);

impl Lanes for Portable {
    const TILE: (usize, usize) = (4, 1);
    const TILE_BF16: usize = 4;
    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self([value; 16])
    }
    #[inline(always)]
    fn load(from: &[f32; 16]) -> Self {
        Self(*from)
    }
    #[inline(always)]
    fn load_bf16(from: &[u16; 16]) -> Self {
        Self(from.map(|half| f32::from_bits(u32::from(half) << 16)))
    }
    #[inline(always)]
    fn load_pairs(from: &[[u16; 2]; 16]) -> Self {
        Self(from.map(|[lower, upper]| f32::from_bits(u32::from(upper) << 16 | u32::from(lower))))
    }
    #[inline(always)]
    fn upper(self) -> Self {
        Self(self.0.map(|both| f32::from_bits(both.to_bits() & 0xffff_0000)))
    }
    #[inline(always)]
    fn lower(self) -> Self {
        Self(self.0.map(|both| f32::from_bits(both.to_bits() << 16)))
    }
    #[inline(always)]
    fn store(self, to: &mut [f32; 16]) {
        *to = self.0;
    }
    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i].mul_add(factor.0[i], addend.0[i])))
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512, pairs_are_as_expected};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::asm;
    use std::arch::x86_64::{
        __m256, __m512, __m512bh, _MM_HINT_T1, _mm_loadu_si128, _mm_prefetch, _mm256_and_ps, _mm256_castps_si256,
        _mm256_castsi256_ps, _mm256_cvtepu16_epi32, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_loadu_si256,
        _mm256_set1_epi32, _mm256_set1_ps, _mm256_slli_epi32, _mm256_storeu_ps, _mm512_and_si512, _mm512_castps_si512,
        _mm512_castsi512_ps, _mm512_cvtepu16_epi32, _mm512_dpbf16_ps, _mm512_fmadd_ps, _mm512_loadu_ps,
        _mm512_set1_epi32, _mm512_set1_ps, _mm512_slli_epi32, _mm512_storeu_ps,
    };
    use std::mem::transmute;

    use super::{Lanes, one_by_one, pair, pairs};

    // These types are named only by functions that `simd!` and `product` call after the processor was asked for their
    // instruction set; that is the reason for every `unsafe` below.

    #[derive(Clone, Copy)]
    pub(crate) struct Avx2(__m256, __m256);

    impl Lanes for Avx2 {
        const TILE: (usize, usize) = (6, 1);
        const TILE_BF16: usize = 5;
        #[inline(always)]
        fn splat(value: f32) -> Self {
            // SAFETY: the instruction set is there, see above.
            unsafe { Self(_mm256_set1_ps(value), _mm256_set1_ps(value)) }
        }
        #[inline(always)]
        fn load(from: &[f32; 16]) -> Self {
            // SAFETY: sixteen floats are readable; the instruction set is there, see above.
            unsafe { Self(_mm256_loadu_ps(from.as_ptr()), _mm256_loadu_ps(from.as_ptr().add(8))) }
        }
        #[inline(always)]
        fn load_bf16(from: &[u16; 16]) -> Self {
            // SAFETY: sixteen halves are readable; the instruction set is there, see above.
            unsafe {
                let [low, high] = [0, 8].map(|at| {
                    let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.as_ptr().add(at).cast()));
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
                });
                Self(low, high)
            }
        }
        #[inline(always)]
        fn load_pairs(from: &[[u16; 2]; 16]) -> Self {
            // SAFETY: sixteen pairs are readable; the instruction set is there, see above.
            unsafe { Self(_mm256_loadu_ps(from.as_ptr().cast()), _mm256_loadu_ps(from.as_ptr().add(8).cast())) }
        }
        #[inline(always)]
        fn upper(self) -> Self {
            // SAFETY: the instruction set is there, see above.
            unsafe {
                let mask = _mm256_castsi256_ps(_mm256_set1_epi32(0xffff_0000_u32.cast_signed()));
                Self(_mm256_and_ps(self.0, mask), _mm256_and_ps(self.1, mask))
            }
        }
        #[inline(always)]
        fn lower(self) -> Self {
            // SAFETY: the instruction set is there, see above.
            unsafe {
                let (low, high) = (_mm256_castps_si256(self.0), _mm256_castps_si256(self.1));
                Self(
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)),
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)),
                )
            }
        }
        #[inline(always)]
        fn load_bf16_odd(from: &[u16; 32]) -> Self {
            // SAFETY: 32 halves are readable; the instruction set is there, see above. The assembly is empty: the pointer comes
            // out as it went in.
            unsafe {
                // Read anew: kept from the even ones, they would take the registers of two accumulators.
                let mut from: *const [u16; 32] = from;
                asm!("/* {0} */", inout(reg) from, options(pure, readonly, nostack, preserves_flags));
                Self::load_pairs(pairs(&*from)).lower()
            }
        }
        #[inline(always)]
        fn store(self, to: &mut [f32; 16]) {
            // SAFETY: sixteen floats are writable; the instruction set is there, see above.
            unsafe {
                _mm256_storeu_ps(to.as_mut_ptr(), self.0);
                _mm256_storeu_ps(to.as_mut_ptr().add(8), self.1);
            }
        }
        #[inline(always)]
        fn mul_add(self, factor: Self, addend: Self) -> Self {
            // SAFETY: the instruction set is there, see above.
            unsafe { Self(_mm256_fmadd_ps(self.0, factor.0, addend.0), _mm256_fmadd_ps(self.1, factor.1, addend.1)) }
        }
        #[inline(always)]
        fn prefetch(at: *const u8) {
            // SAFETY: prefetching never faults.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
        }
    }

    /// Whether this processor's [`Lanes::mul_add_pairs`] does what it says.
    #[target_feature(enable = "avx512f,avx512vl,avx512bf16,avx2,fma")]
    pub(crate) fn pairs_are_as_expected() -> bool {
        let sum = |from: f32, upper: f32, lower: f32| {
            let one = Avx512::<true>::splat(pair([1.0, 1.0]));
            let mut sums = [0.0; 16];
            one.mul_add_pairs(Avx512::splat(pair([upper, lower])), Avx512::splat(from)).store(&mut sums);
            sums
        };
        let (half, least) = (2.0_f32.powi(-24), 2.0_f32.powi(-30));
        // Of 1 and two halves of its last bit nothing is left if each is rounded off; and what is small counts once 1 is gone.
        sum(1.0, half, half) == [1.0; 16] && sum(1.0, -1.0, least) == [least; 16] && sum(1.0, least, -1.0) == [0.0; 16]
    }

    /// With PAIRS, two products of bf16 are added at once.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx512<const PAIRS: bool>(__m512);

    impl<const PAIRS: bool> Lanes for Avx512<PAIRS> {
        const TILE: (usize, usize) = (12, 2);
        const TILE_BF16: usize = 12;
        #[inline(always)]
        fn splat(value: f32) -> Self {
            // SAFETY: the instruction set is there, see above.
            unsafe { Self(_mm512_set1_ps(value)) }
        }
        #[inline(always)]
        fn load(from: &[f32; 16]) -> Self {
            // SAFETY: sixteen floats are readable; the instruction set is there, see above.
            unsafe { Self(_mm512_loadu_ps(from.as_ptr())) }
        }
        #[inline(always)]
        fn load_bf16(from: &[u16; 16]) -> Self {
            // SAFETY: sixteen halves are readable; the instruction set is there, see above.
            unsafe {
                let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.as_ptr().cast()));
                Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide)))
            }
        }
        #[inline(always)]
        fn load_pairs(from: &[[u16; 2]; 16]) -> Self {
            // SAFETY: sixteen pairs are readable; the instruction set is there, see above.
            unsafe { Self(_mm512_loadu_ps(from.as_ptr().cast())) }
        }
        #[inline(always)]
        fn upper(self) -> Self {
            // SAFETY: the instruction set is there, see above.
            unsafe {
                let mask = _mm512_set1_epi32(0xffff_0000_u32.cast_signed());
                Self(_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(self.0), mask)))
            }
        }
        #[inline(always)]
        fn lower(self) -> Self {
            // SAFETY: the instruction set is there, see above.
            unsafe { Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_castps_si512(self.0)))) }
        }
        #[inline(always)]
        fn store(self, to: &mut [f32; 16]) {
            // SAFETY: sixteen floats are writable; the instruction set is there, see above.
            unsafe { _mm512_storeu_ps(to.as_mut_ptr(), self.0) }
        }
        #[inline(always)]
        fn mul_add(self, factor: Self, addend: Self) -> Self {
            // SAFETY: the instruction set is there, see above.
            unsafe { Self(_mm512_fmadd_ps(self.0, factor.0, addend.0)) }
        }
        #[inline(always)]
        fn mul_add_pairs(self, factor: Self, addend: Self) -> Self {
            if !PAIRS {
                return one_by_one(self, factor, addend);
            }
            // SAFETY: this instruction, too, is there where there are to be PAIRS; its operands are 32 bf16 each.
            unsafe {
                let (x, w) = (transmute::<__m512, __m512bh>(self.0), transmute::<__m512, __m512bh>(factor.0));
                Self(_mm512_dpbf16_ps(addend.0, x, w))
            }
        }
        #[inline(always)]
        fn prefetch(at: *const u8) {
            // SAFETY: prefetching never faults.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
        }
    }
}
