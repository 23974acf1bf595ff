//! Weights packed for the tiles of [`product`](crate::product).
//!
//! A packed weight has shape `(p, k, PANEL)`: panel `i` holds output features `i * PANEL ..`, padded with zeros, so that
//! the innermost loop streams. Stored as f32, or as bf16, with half the bytes to stream; then what it is multiplied with is
//! rounded to bf16, too, as processors add two products of bf16 in the time of one of floats. Steps of bf16 stand in pairs, lane
//! by lane ([`place`]): only [`Matrix::new`] and [`adam_step`](crate::adam_step) write them.

use std::ops::Range;
use std::sync::Arc;

use crate::dispatch::simd;
use crate::lanes::{Lanes, widen};

/// Output features in a panel.
pub const PANEL: usize = 16;

/// What the numbers of a weight are computed with. Sums are always f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    /// 4 bytes a number.
    F32,
    /// 2 bytes a number, see [`to_bf16`]: of the weight, and of what it is multiplied with.
    Bf16,
}

/// A packed weight of n output and k input features. Clones share memory.
#[derive(Debug, Clone)]
pub struct Matrix {
    n: usize,
    k: usize,
    numbers: Numbers,
}

#[derive(Debug, Clone)]
enum Numbers {
    F32(Arc<Vec<f32>>),
    Bf16(Arc<Vec<u16>>),
}

/// Panels of either storage.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Panels<'a> {
    F32(&'a [f32]),
    /// In the order of [`place`].
    Bf16(&'a [u16]),
}

/// Length of a packed weight of shape `(n, k)`, in numbers.
#[must_use]
pub fn packed_len(n: usize, k: usize) -> usize {
    n.div_ceil(PANEL) * k * PANEL
}

/// Packs a row-major weight of shape `(n, k)` to `(p, k, PANEL)`.
///
/// # Panics
/// If `weight` is not `n * k` long.
#[must_use]
pub fn pack(weight: &[f32], n: usize, k: usize) -> Vec<f32> {
    assert_eq!(weight.len(), n * k, "a weight of shape ({n}, {k})");
    let mut packed = vec![0.0; packed_len(n, k)];
    for (row, values) in weight.chunks_exact(k).enumerate() {
        let base = row / PANEL * k * PANEL + row % PANEL;
        for (i, v) in values.iter().enumerate() {
            packed[base + i * PANEL] = *v;
        }
    }
    packed
}

/// Inverse of [`pack`].
///
/// # Panics
/// If `packed` does not have the length of a packed weight of this shape.
#[must_use]
pub fn unpack(packed: &[f32], n: usize, k: usize) -> Vec<f32> {
    assert_eq!(packed.len(), packed_len(n, k), "a packed weight of shape ({n}, {k})");
    let mut weight = vec![0.0; n * k];
    for (row, values) in weight.chunks_exact_mut(k).enumerate() {
        let base = row / PANEL * k * PANEL + row % PANEL;
        for (i, v) in values.iter_mut().enumerate() {
            *v = packed[base + i * PANEL];
        }
    }
    weight
}

/// Rounds to bf16, the upper half of an f32: to nearest even, and to zero below 2^-55.
///
/// Sums of products of such numbers are zero or at least 2^-124, where they begin at zero or at other such sums: never subnormal,
/// which instructions that multiply bf16 would take for zero, and others would not.
#[inline(always)]
#[must_use]
pub fn to_bf16(value: f32) -> u16 {
    (round_bits(value) >> 16) as u16
}

/// A number rounded to bf16, as the bits of an f32.
#[inline(always)]
pub(crate) fn round_bits(value: f32) -> u32 {
    /// 2^-55.
    const LEAST: u32 = (127 - 55) << 23;
    let bits = value.to_bits();
    // Rounding would carry some of what is not a number into its sign.
    let rounded = if value.is_nan() { bits | 1 << 22 } else { bits.wrapping_add(0x7fff + (bits >> 16 & 1)) };
    if bits << 1 < LEAST << 1 { 0 } else { rounded & 0xffff_0000 }
}

simd! {
    /// Rounds numbers as [`to_bf16`] does.
    pub fn round_to_bf16(values: &mut [f32]) {
        for value in values {
            *value = f32::from_bits(round_bits(*value));
        }
    }
}

/// Widens a bf16.
#[inline(always)]
#[must_use]
pub fn from_bf16(value: u16) -> f32 {
    f32::from_bits(u32::from(value) << 16)
}

/// Where lane `lane` of step `i` stands among the bf16 of a panel of `k` steps: two steps take turns, lane by lane, so that
/// one mask and one shift widen both, the later one first: of two products at once, processors add that of the upper halves
/// before the other. The last step of an odd k stands alone.
#[inline(always)]
const fn place(k: usize, i: usize, lane: usize) -> usize {
    if i + 1 == k && i.is_multiple_of(2) { i * PANEL + lane } else { i / 2 * 2 * PANEL + lane * 2 + 1 - i % 2 }
}

/// Rounds steps of a panel into their places: pairs, and the last step of an odd k.
#[inline(always)]
pub(crate) fn round_steps(from: &[f32], to: &mut [u16]) {
    let (from, last) = from.as_chunks::<{ 2 * PANEL }>();
    let (to, to_last) = to.as_chunks_mut::<{ 2 * PANEL }>();
    for (from, to) in from.iter().zip(to) {
        for lane in 0..PANEL {
            to[2 * lane + 1] = to_bf16(from[lane]);
            to[2 * lane] = to_bf16(from[PANEL + lane]);
        }
    }
    last.iter().zip(to_last).for_each(|(from, to)| *to = to_bf16(*from));
}

impl Matrix {
    /// A weight of shape `(n, k)` from its packed numbers, in f32 without a copy or rounded to bf16.
    ///
    /// # Panics
    /// If `packed` does not have the length of a packed weight of this shape.
    #[must_use]
    pub fn new(packed: &Arc<Vec<f32>>, n: usize, k: usize, storage: Storage) -> Self {
        assert_eq!(packed.len(), packed_len(n, k), "a packed weight of shape ({n}, {k})");
        let numbers = match storage {
            Storage::F32 => Numbers::F32(packed.clone()),
            Storage::Bf16 => {
                let mut rounded = vec![0; packed.len()];
                let panels = packed.chunks_exact(k * PANEL).zip(rounded.chunks_exact_mut(k * PANEL));
                panels.for_each(|(from, to)| round_steps(from, to));
                Numbers::Bf16(Arc::new(rounded))
            }
        };
        Self { n, k, numbers }
    }

    /// A weight whose bf16 numbers were made by [`adam_step`](crate::adam_step), rounded as [`to_bf16`] does.
    ///
    /// # Panics
    /// If `rounded` does not have the length of a packed weight of this shape.
    #[must_use]
    pub fn of_bf16(rounded: Arc<Vec<u16>>, n: usize, k: usize) -> Self {
        assert_eq!(rounded.len(), packed_len(n, k), "a packed weight of shape ({n}, {k})");
        Self { n, k, numbers: Numbers::Bf16(rounded) }
    }

    /// Output features.
    #[must_use]
    pub fn n(&self) -> usize {
        self.n
    }

    /// Input features.
    #[must_use]
    pub fn k(&self) -> usize {
        self.k
    }

    /// How its numbers are stored.
    #[must_use]
    pub fn storage(&self) -> Storage {
        match self.numbers {
            Numbers::F32(_) => Storage::F32,
            Numbers::Bf16(_) => Storage::Bf16,
        }
    }

    /// Bytes of its numbers.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match self.panels() {
            Panels::F32(panels) => size_of_val(panels),
            Panels::Bf16(panels) => size_of_val(panels),
        }
    }

    pub(crate) fn panels(&self) -> Panels<'_> {
        match &self.numbers {
            Numbers::F32(numbers) => Panels::F32(numbers),
            Numbers::Bf16(numbers) => Panels::Bf16(numbers),
        }
    }

    /// At most sixteen input features of panel `panel`, sixteen numbers each, from an even one on; zeros behind them.
    #[inline(always)]
    pub(crate) fn square<V: Lanes>(&self, panel: usize, inputs: Range<usize>) -> [[f32; PANEL]; PANEL] {
        let at = (panel * self.k + inputs.start) * PANEL..(panel * self.k + inputs.end) * PANEL;
        let mut square = [[0.0; PANEL]; PANEL];
        let to = &mut square.as_flattened_mut()[..at.len()];
        match self.panels() {
            Panels::F32(panels) => widen::<V, f32>(&panels[at], to),
            Panels::Bf16(panels) => widen::<V, u16>(&panels[at], to),
        }
        square
    }

    /// Row `row` (all its input features), appended to `to`.
    pub(crate) fn push_row(&self, row: usize, to: &mut Vec<f32>) {
        let (base, lane) = (row / PANEL * self.k * PANEL, row % PANEL);
        match self.panels() {
            Panels::F32(panels) => to.extend((0..self.k).map(|i| panels[base + i * PANEL + lane])),
            Panels::Bf16(panels) => {
                to.extend((0..self.k).map(|i| from_bf16(panels[base + place(self.k, i, lane)])));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_rounds_to_nearest_even() {
        for (value, want) in [(1.0, 0x3f80), (1.003_906_2, 0x3f80), (1.003_906_4, 0x3f81), (1.011_718_8, 0x3f82)] {
            assert_eq!(to_bf16(value), want, "{value}");
        }
        assert_eq!(from_bf16(to_bf16(-0.15625)), -0.15625);
        assert!(
            [0x7fff_ffff, 0x7f80_0001, 0xffff_8000]
                .iter()
                .all(|bits| from_bf16(to_bf16(f32::from_bits(*bits))).is_nan())
        );
    }
}
