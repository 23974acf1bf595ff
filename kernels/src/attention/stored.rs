//! Keys and values as attention streams them.

use super::Heads;
use crate::dispatch::simd;
use crate::matrix::{PANEL, Storage, round_bits, to_bf16};
use crate::product::Weight;

/// Keys, already turned, and values of consecutive positions in one layer. Each head's stand together, so that attention
/// streams them.
#[derive(Debug, Clone)]
pub struct KeyValues {
    pub(super) shape: Heads,
    pub(super) rows: usize,
    pub(super) numbers: Numbers,
}

#[derive(Debug, Clone)]
pub(super) enum Numbers {
    F32(Vec<HeadRows<f32>>),
    Bf16(Vec<HeadRows<[u16; 2]>>),
}

/// Calls something with the rows of all heads, of either storage.
macro_rules! of_heads {
    ($numbers:expr, $heads:ident => $body:expr) => {
        match $numbers {
            $crate::attention::stored::Numbers::F32($heads) => $body,
            $crate::attention::stored::Numbers::Bf16($heads) => $body,
        }
    };
}
pub(super) use of_heads;

/// Rows of a head. What they are multiplied by comes in steps of [`NUMBERS`](crate::lanes::Element::NUMBERS) numbers: features
/// with keys, positions with values.
#[derive(Debug, Clone, Default)]
pub(super) struct HeadRows<E> {
    /// Panels of 16 positions: `(panels, steps, PANEL)`.
    pub(super) keys: Vec<E>,
    /// `(steps, padded head_dim)`; zeros where the last step is half full.
    pub(super) values: Vec<E>,
}

/// What keys and values are stored as.
pub(super) trait Number: Weight + Default {
    /// Stores a number as the i-th of a step.
    fn put(&mut self, i: usize, value: f32);
    /// Adds the values along a path, in order, each as often as its weight says.
    fn add_path(mixed: &mut [f32], weights: &[f32], path: &[usize], values: &[Self]);
}

impl Number for f32 {
    #[inline(always)]
    fn put(&mut self, _: usize, value: f32) {
        *self = value;
    }

    fn add_path(mixed: &mut [f32], weights: &[f32], path: &[usize], values: &[Self]) {
        add_path(mixed, weights, path, values);
    }
}

impl Number for [u16; 2] {
    /// The first in the upper half.
    #[inline(always)]
    fn put(&mut self, i: usize, value: f32) {
        self[1 - i] = to_bf16(value);
    }

    fn add_path(mixed: &mut [f32], weights: &[f32], path: &[usize], values: &[Self]) {
        add_path_bf16(mixed, weights, path, values);
    }
}

simd! {
    fn add_path<V>(mixed: &mut [f32], weights: &[f32], path: &[usize], values: &[f32]) {
        for (weight, node) in weights.iter().zip(path) {
            let row = values[node * mixed.len()..].as_chunks::<PANEL>().0;
            for (to, value) in mixed.as_chunks_mut::<PANEL>().0.iter_mut().zip(row) {
                V::splat(*weight).mul_add(V::load(value), V::load(to)).store(to);
            }
        }
    }
}

simd! {
    fn add_path_bf16<V>(mixed: &mut [f32], weights: &[f32], path: &[usize], values: &[[u16; 2]]) {
        for (weight, node) in weights.iter().zip(path) {
            let row = values[node / 2 * mixed.len()..].as_chunks::<PANEL>().0;
            let (weight, is_first) = (V::splat(f32::from_bits(round_bits(*weight))), node % 2 == 0);
            for (to, pairs) in mixed.as_chunks_mut::<PANEL>().0.iter_mut().zip(row) {
                let pairs = V::load_pairs(pairs);
                let value = if is_first { pairs.upper() } else { pairs.lower() };
                weight.mul_add(value, V::load(to)).store(to);
            }
        }
    }
}

impl<E: Number> HeadRows<E> {
    fn clear(&mut self) {
        self.keys.clear();
        self.values.clear();
    }

    fn copy_from(&mut self, other: &Self) {
        self.keys.clone_from(&other.keys);
        self.values.clone_from(&other.values);
    }

    /// Appends position `row`.
    fn push(&mut self, row: usize, key: &[f32], value: &[f32], padded: usize) {
        let (panel, lane) = (row / PANEL * PANEL * (key.len() / E::NUMBERS), row % PANEL);
        if lane == 0 {
            self.keys.resize(panel + key.len() / E::NUMBERS * PANEL, E::default());
        }
        for (to, step) in self.keys[panel + lane..].iter_mut().step_by(PANEL).zip(key.chunks_exact(E::NUMBERS)) {
            step.iter().enumerate().for_each(|(i, value)| to.put(i, *value));
        }
        let (step, i) = (row / E::NUMBERS, row % E::NUMBERS);
        self.values.resize((step + 1) * padded, E::default());
        self.values[step * padded..].iter_mut().zip(value).for_each(|(to, value)| to.put(i, *value));
    }
}

impl KeyValues {
    /// None yet.
    ///
    /// # Panics
    /// If heads of bf16 have an odd width.
    #[must_use]
    pub fn new(shape: Heads) -> Self {
        let numbers = match shape.storage {
            Storage::F32 => Numbers::F32(vec![HeadRows::default(); shape.kv_heads]),
            Storage::Bf16 => Numbers::Bf16(vec![HeadRows::default(); shape.kv_heads]),
        };
        let fits = shape.storage == Storage::F32 || shape.head_dim.is_multiple_of(2);
        assert!(fits, "keys in bf16 are pairs of numbers: a head of {} cannot be split into them", shape.head_dim);
        Self { shape, rows: 0, numbers }
    }

    /// Positions stored.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Forgets all positions and keeps the memory.
    pub fn clear(&mut self) {
        self.rows = 0;
        of_heads!(&mut self.numbers, heads => heads.iter_mut().for_each(HeadRows::clear));
    }

    /// Becomes the same as another, of the same shape, and keeps the memory.
    ///
    /// # Panics
    /// If it has another shape.
    pub fn copy_from(&mut self, other: &Self) {
        assert_eq!(self.shape, other.shape, "keys and values copied to others");
        self.rows = other.rows;
        match (&mut self.numbers, &other.numbers) {
            (Numbers::F32(to), Numbers::F32(from)) => to.iter_mut().zip(from).for_each(|(to, from)| to.copy_from(from)),
            (Numbers::Bf16(to), Numbers::Bf16(from)) => {
                to.iter_mut().zip(from).for_each(|(to, from)| to.copy_from(from));
            }
            _ => unreachable!("a shape says what is stored"),
        }
    }

    /// Appends a position: key and value, `(kv_heads * head_dim)` each.
    ///
    /// # Panics
    /// If they have other lengths.
    pub fn push(&mut self, key: &[f32], value: &[f32]) {
        let width = self.shape.kv_width();
        assert!(key.len() == width && value.len() == width, "keys and values of {} and {}", key.len(), value.len());
        let (row, dim, padded) = (self.rows, self.shape.head_dim, self.shape.padded());
        let own = key.chunks_exact(dim).zip(value.chunks_exact(dim));
        of_heads!(&mut self.numbers, heads => {
            heads.iter_mut().zip(own).for_each(|(head, (key, value))| head.push(row, key, value, padded));
        });
        self.rows += 1;
    }

    /// Appends positions from rows of keys and of values.
    pub fn extend(&mut self, keys: &[f32], values: &[f32]) {
        let width = self.shape.kv_width();
        keys.chunks_exact(width).zip(values.chunks_exact(width)).for_each(|(key, value)| self.push(key, value));
    }
}
