//! Rows of x as the tiles read them.

use std::ops::Range;

use super::{Strides, first_of};
use crate::lanes::Element;
use crate::turn::turn;

/// Rows in parts of about the same height: as tiles they keep more chains in flight than full ones and a rest.
pub(super) struct Parts {
    pub(super) rows: Range<usize>,
    pub(super) count: usize,
}

impl Parts {
    pub(super) fn of(rows: Range<usize>, most: usize) -> Self {
        let count = rows.len().div_ceil(most);
        Self { rows, count }
    }

    #[inline(always)]
    pub(super) fn get(&self, part: usize) -> Range<usize> {
        let bound = |i: usize| self.rows.start + self.rows.len() * i / self.count;
        bound(part)..bound(part + 1)
    }

    /// Some steps of x as tiles of weights E read it: tile after tile, each step's rows side by side, so that all addresses of a
    /// tile are distances from one.
    #[inline(always)]
    pub(super) fn side_by_side<'a, E: Element>(
        &self,
        x: &'a [f32],
        strides: Strides,
        steps: Range<usize>,
        [packed, narrow]: [&'a mut Vec<f32>; 2],
    ) -> &'a [f32] {
        let Strides { x_row, x_step, .. } = strides;
        let len = steps.len();
        let line = |row: usize| &x[row * x_row + steps.start * E::NUMBERS..][..len * E::NUMBERS];
        if self.rows.len() == 1 && x_step == 1 {
            if !E::NARROWS {
                return line(self.rows.start);
            }
            let narrow = first_of(narrow, len);
            E::narrow(line(self.rows.start), narrow);
            return narrow;
        }
        let packed = first_of(packed, self.rows.len() * len);
        let mut rest = &mut *packed;
        for tile in 0..self.count {
            let rows = self.get(tile);
            let (to, after) = rest.split_at_mut(rows.len() * len);
            // Loops, not iterators' closures: those would not be compiled for the instruction set.
            if x_step > 1 {
                let steps = (steps.start..).map(|step| &x[step * E::NUMBERS * x_step + rows.start * x_row..]);
                for (to, x) in to.chunks_exact_mut(rows.len()).zip(steps) {
                    narrow_few::<E>(x, x_step, to);
                }
            } else if E::NARROWS {
                let narrow = first_of(narrow, rows.len() * len);
                for (to, row) in narrow.chunks_exact_mut(len).zip(rows.clone()) {
                    E::narrow(line(row), to);
                }
                turn(narrow, len, rows.len(), to);
            } else {
                turn(&x[rows.start * x_row + steps.start..], x_row, rows.len(), to);
            }
            rest = after;
        }
        packed
    }
}

/// A step of a dozen rows, without the call that a longer copy is worth.
#[inline(always)]
fn narrow_few<E: Element>(x: &[f32], x_step: usize, to: &mut [f32]) {
    let (fours, rest) = to.as_chunks_mut::<4>();
    let at = fours.len() * 4;
    for (i, to) in fours.iter_mut().enumerate() {
        E::narrow_rows(&x[i * 4..], x_step, to);
    }
    for (i, to) in rest.iter_mut().enumerate() {
        E::narrow_rows(&x[at + i..], x_step, std::array::from_mut(to));
    }
}
