//! Sixteen floats that are computed together, in registers of each instruction set. Every operation acts on each lane
//! alone and rounds once, so that all sets give the same bits.

/// Sixteen lanes.
pub(crate) trait Lanes: Copy {
    /// Rows and panels of the largest tile of a product whose accumulators stay in registers.
    const TILE: (usize, usize);
    fn splat(value: f32) -> Self;
    fn load(from: &[f32; 16]) -> Self;
    /// Sixteen bf16, stored as [`interleave`](crate::matrix) says: even places are lanes 0 to 7, odd ones 8 to 15.
    fn load_bf16(from: &[u16; 16]) -> Self;
    fn store(self, to: &mut [f32; 16]);
    /// `self * factor + addend`, rounded once.
    fn mul_add(self, factor: Self, addend: Self) -> Self;
    /// Asks for a cache line that is read soon; any address will do.
    fn prefetch(_at: *const u8) {}
}

/// What a weight is stored as.
pub(crate) trait Element: Copy + Sync {
    fn lanes<V: Lanes>(from: &[Self; 16]) -> V;
}

impl Element for f32 {
    #[inline(always)]
    fn lanes<V: Lanes>(from: &[Self; 16]) -> V {
        V::load(from)
    }
}

/// The upper half of a float.
impl Element for u16 {
    #[inline(always)]
    fn lanes<V: Lanes>(from: &[Self; 16]) -> V {
        V::load_bf16(from)
    }
}

/// For any processor.
#[derive(Clone, Copy)]
pub(crate) struct Portable([f32; 16]);

impl Lanes for Portable {
    const TILE: (usize, usize) = (4, 1);
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
        Self(std::array::from_fn(|i| f32::from_bits(u32::from(from[i % 8 * 2 + i / 8]) << 16)))
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
pub(crate) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m256, __m512, _MM_HINT_T1, _mm_prefetch, _mm256_and_si256, _mm256_castsi256_ps, _mm256_fmadd_ps,
        _mm256_loadu_ps, _mm256_loadu_si256, _mm256_set1_epi32, _mm256_set1_ps, _mm256_slli_epi32, _mm256_storeu_ps,
        _mm512_castsi512_ps, _mm512_cvtepu16_epi32, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_permutexvar_epi32,
        _mm512_set1_ps, _mm512_setr_epi32, _mm512_slli_epi32, _mm512_storeu_ps,
    };

    use super::Lanes;

    // These types are named only by functions that `simd!` calls after it asked the processor for their instruction
    // set; that is the reason for every `unsafe` below.

    #[derive(Clone, Copy)]
    pub(crate) struct Avx2(__m256, __m256);

    impl Lanes for Avx2 {
        const TILE: (usize, usize) = (6, 1);
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
                let both = _mm256_loadu_si256(from.as_ptr().cast());
                let even = _mm256_slli_epi32::<16>(both);
                let odd = _mm256_and_si256(both, _mm256_set1_epi32(0xffff_0000_u32.cast_signed()));
                Self(_mm256_castsi256_ps(even), _mm256_castsi256_ps(odd))
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

    #[derive(Clone, Copy)]
    pub(crate) struct Avx512(__m512);

    impl Lanes for Avx512 {
        const TILE: (usize, usize) = (12, 2);
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
                let order = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
                let sorted = _mm512_permutexvar_epi32(order, wide);
                Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(sorted)))
            }
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
        fn prefetch(at: *const u8) {
            // SAFETY: prefetching never faults.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
        }
    }
}
