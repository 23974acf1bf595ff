//! Keys and values outside the model, in pages: what the requests of a group have in common they share, and who ends leaves its
//! pages to others (Kwon et al. 2023, "Efficient memory management for large language model serving with PagedAttention").

use std::sync::Arc;

use kernels::{Heads, KeyValues};

/// Positions of a page.
pub(crate) const PAGE: usize = 64;

/// Keys and values of up to [`PAGE`] consecutive positions, in every layer.
type Page = Vec<KeyValues>;

/// Where pages come from, and where they go.
#[derive(Debug)]
pub(crate) struct Pages {
    layers: usize,
    shape: Heads,
    free: Vec<Page>,
}

/// Keys and values that a request's next row attends to, beside the rows of the same batch. A clone shares its pages.
#[derive(Debug, Clone, Default)]
pub(crate) struct Cache {
    /// All full but the last.
    pages: Vec<Arc<Page>>,
    rows: usize,
}

impl Pages {
    pub(crate) fn new(layers: usize, shape: Heads) -> Self {
        Self { layers, shape, free: Vec::new() }
    }

    fn take(&mut self) -> Page {
        self.free.pop().unwrap_or_else(|| (0..self.layers).map(|_| KeyValues::new(self.shape)).collect())
    }

    /// Forgets free pages beyond so many.
    pub(crate) fn keep_free(&mut self, count: usize) {
        self.free.truncate(count);
    }

    /// Takes the pages back that nobody else shares.
    pub(crate) fn give_back(&mut self, cache: Cache) {
        for mut page in cache.pages.into_iter().filter_map(|page| Arc::try_unwrap(page).ok()) {
            page.iter_mut().for_each(KeyValues::clear);
            self.free.push(page);
        }
    }
}

impl Cache {
    /// Positions that it holds.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// The same positions as its first pages, all of them full.
    pub(crate) fn first_pages(&self, count: usize) -> Self {
        debug_assert!(count * PAGE <= self.rows, "{count} pages of {} rows", self.rows);
        Self { pages: self.pages[..count].to_vec(), rows: count * PAGE }
    }

    /// Whether nobody else goes on from it: who does shares at least its first page, unless that was the last one, too.
    pub(crate) fn is_own(&self) -> bool {
        self.pages.first().is_some_and(|page| Arc::strong_count(page) == 1)
    }

    /// Number of its pages.
    pub(crate) fn pages(&self) -> usize {
        self.pages.len()
    }

    /// What holds its positions in a layer, in order.
    pub(crate) fn layer(&self, layer: usize) -> impl Iterator<Item = &KeyValues> {
        self.pages.iter().map(move |page| &page[layer])
    }

    /// Appends a position: row `row` of each layer's new keys and values. A page that others share is copied first.
    pub(crate) fn push(&mut self, pages: &mut Pages, new: &[(Vec<f32>, Vec<f32>)], row: usize) {
        if self.rows.is_multiple_of(PAGE) {
            self.pages.push(Arc::new(pages.take()));
        }
        self.rows += 1;
        let Some(last) = self.pages.last_mut() else { unreachable!("there is a page for every position") };
        if Arc::get_mut(last).is_none() {
            let mut own = pages.take();
            own.iter_mut().zip(&**last).for_each(|(own, shared)| own.copy_from(shared));
            *last = Arc::new(own);
        }
        let Some(page) = Arc::get_mut(last) else { unreachable!("nobody else has it") };
        let width = pages.shape.kv_width();
        let at = row * width..(row + 1) * width;
        for (known, (keys, values)) in page.iter_mut().zip(new) {
            known.push(&keys[at.clone()], &values[at.clone()]);
        }
    }

    /// Pages that these caches use, shared ones once.
    pub(crate) fn pages_of<'a>(caches: impl Iterator<Item = &'a Self>) -> usize {
        let mut pages: Vec<_> = caches.flat_map(|cache| cache.pages.iter().map(Arc::as_ptr)).collect();
        pages.sort_unstable();
        pages.dedup();
        pages.len()
    }
}

#[cfg(test)]
mod tests {
    use state::plan::TinyShape;

    use super::*;
    use crate::layer::heads;
    use crate::load::Config;

    #[test]
    fn pages_are_shared_until_they_differ_and_used_again() {
        let shape = TinyShape { hidden: 8, layers: 2, heads: 2, kv_heads: 1, ffn: 8, positions_max: 512 };
        let config = Config::tiny(&shape).unwrap();
        let mut pages = Pages::new(config.layers, heads(&config, config.storage));
        let new = vec![(vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], vec![0.5; 8]); 2];
        let mut first = Cache::default();
        (0..PAGE + 3).for_each(|row| first.push(&mut pages, &new, row % 2));
        let mut second = first.clone();
        assert_eq!((first.rows(), Cache::pages_of([&first, &second].into_iter())), (PAGE + 3, 2));
        second.push(&mut pages, &new, 0);
        assert_eq!(Cache::pages_of([&first, &second].into_iter()), 3, "the page that both write to is copied");
        let rows = |cache: &Cache| cache.layer(1).map(KeyValues::rows).collect::<Vec<_>>();
        assert_eq!((rows(&first), rows(&second)), (vec![PAGE, 3], vec![PAGE, 4]));
        pages.give_back(second);
        assert_eq!(pages.free.len(), 1, "the other page is still shared");
        pages.give_back(first);
        assert_eq!(pages.free.len(), 3);
        let mut third = Cache::default();
        third.push(&mut pages, &new, 1);
        assert_eq!((pages.free.len(), rows(&third)), (2, vec![1]));
    }
}
