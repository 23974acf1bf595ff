//! Rows of x as the tiles read them.

use std::ops::Range;

use super::{Strides, first_of};
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

    /// Some steps of x as tiles read it: tile after tile, each step's rows side by side, so that all addresses of a tile
    /// are distances from one.
    #[inline(always)]
    pub(super) fn side_by_side<'a>(
        &self,
        x: &'a [f32],
        strides: Strides,
        steps: Range<usize>,
        packed: &'a mut Vec<f32>,
    ) -> &'a [f32] {
        let Strides { x_row, x_step, .. } = strides;
        if self.rows.len() == 1 && x_step == 1 {
            return &x[self.rows.start * x_row..][steps];
        }
        let packed = first_of(packed, self.rows.len() * steps.len());
        let mut rest = &mut *packed;
        for tile in 0..self.count {
            let rows = self.get(tile);
            let (to, after) = rest.split_at_mut(rows.len() * steps.len());
            if x_step == 1 {
                turn(&x[rows.start * x_row + steps.start..], x_row, rows.len(), to);
            } else {
                let lines = x[steps.start * x_step + rows.start * x_row..].chunks(x_step);
                to.chunks_exact_mut(rows.len()).zip(lines).for_each(|(to, line)| copy_few(&line[..rows.len()], to));
            }
            rest = after;
        }
        packed
    }
}

/// A copy of a dozen floats, without the call that a longer one is worth.
#[inline(always)]
fn copy_few(from: &[f32], to: &mut [f32]) {
    let ((from, from_rest), (to, to_rest)) = (from.as_chunks::<4>(), to.as_chunks_mut::<4>());
    from.iter().zip(to).for_each(|(from, to)| *to = *from);
    from_rest.iter().zip(to_rest).for_each(|(from, to)| *to = *from);
}
