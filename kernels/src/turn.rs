//! Rows become columns, in squares of four.

/// Rows of x, `stride` floats apart, side by side: `(rows, steps)` becomes `(steps, rows)`, as much of it as `to` holds.
#[inline(always)]
pub(crate) fn turn(x: &[f32], stride: usize, rows: usize, to: &mut [f32]) {
    let steps = to.len() / rows;
    let (whole_rows, whole_steps) = (rows / 4 * 4, steps / 4 * 4);
    for row in (0..whole_rows).step_by(4) {
        let lines: [&[f32]; 4] = std::array::from_fn(|i| &x[(row + i) * stride..][..steps]);
        for step in (0..whole_steps).step_by(4) {
            // SAFETY: four steps of lines of `steps` floats, and of rows of `to`, which holds `steps` of them.
            unsafe {
                turn_square(lines.map(|line| line.as_ptr().add(step)), to.as_mut_ptr().add(step * rows + row), rows)
            };
        }
        for step in whole_steps..steps {
            (0..4).for_each(|i| to[step * rows + row + i] = lines[i][step]);
        }
    }
    let at = whole_rows * stride;
    match rows - whole_rows {
        1 => turn_rest::<1>(&x[at..], stride, rows, to),
        2 => turn_rest::<2>(&x[at..], stride, rows, to),
        3 => turn_rest::<3>(&x[at..], stride, rows, to),
        _ => {}
    }
}

/// The last N rows of `to`.
#[inline(always)]
fn turn_rest<const N: usize>(x: &[f32], stride: usize, rows: usize, to: &mut [f32]) {
    let steps = to.len() / rows;
    let lines: [&[f32]; N] = std::array::from_fn(|i| &x[i * stride..][..steps]);
    for (step, to) in to.chunks_exact_mut(rows).enumerate() {
        for i in 0..N {
            to[rows - N + i] = lines[i][step];
        }
    }
}

/// Four floats from each of four places, turned: column i goes to `to + i * stride`.
///
/// # Safety
/// Four floats are readable from each place, and writable from `to + i * stride` for i < 4; the two do not overlap.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn turn_square(from: [*const f32; 4], to: *mut f32, stride: usize) {
    use std::arch::x86_64::{_MM_TRANSPOSE4_PS, _mm_loadu_ps, _mm_storeu_ps};
    // SAFETY: by the caller's promise; every x86-64 has SSE.
    unsafe {
        let [mut a, mut b, mut c, mut d] = from.map(|from| _mm_loadu_ps(from));
        _MM_TRANSPOSE4_PS(&mut a, &mut b, &mut c, &mut d);
        _mm_storeu_ps(to, a);
        _mm_storeu_ps(to.add(stride), b);
        _mm_storeu_ps(to.add(2 * stride), c);
        _mm_storeu_ps(to.add(3 * stride), d);
    }
}

/// Four floats from each of four places, turned: column i goes to `to + i * stride`.
///
/// # Safety
/// Four floats are readable from each place, and writable from `to + i * stride` for i < 4; the two do not overlap.
#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
unsafe fn turn_square(from: [*const f32; 4], to: *mut f32, stride: usize) {
    for (row, from) in from.into_iter().enumerate() {
        for column in 0..4 {
            // SAFETY: by the caller's promise.
            unsafe { *to.add(column * stride + row) = *from.add(column) };
        }
    }
}
