//! Forgetting blocks that no longer run: most code of a guest, its start-up above all, runs once.
//!
//! A pass drops the blocks that nobody asked for since the last one and cuts all ways by which blocks are found
//! without asking, so that those still in use are asked for again. Passes come with the number of new blocks: a
//! guest that runs the same code all the time has none.

use super::{BlockCache, NO_JUMP, NO_LINK};
use crate::core::Core;

/// Fewest new blocks between two passes.
const LEAST_NEW: usize = 4096;

impl BlockCache {
    /// Before a block is built: a pass if it is due.
    pub(super) fn age(&mut self, c: &mut Core) {
        self.built += 1;
        if self.built <= LEAST_NEW.max(self.live() / 2) {
            return;
        }
        self.built = 1;
        self.jumps.fill(NO_JUMP);
        let mut unused = Vec::new();
        for (number, block) in self.blocks.iter_mut().enumerate() {
            block.links = [NO_LINK; 2];
            let used = std::mem::take(&mut block.used) || block.kept;
            if block.valid && !used {
                unused.push(number as u32);
                block.ops = Box::default();
            }
        }
        for number in unused {
            self.drop_block(c, number);
        }
    }

    /// Exempts a block from aging: it runs without being asked for.
    pub(crate) fn keep(&mut self, number: u32) {
        self.blocks[number as usize].kept = true;
    }
}
