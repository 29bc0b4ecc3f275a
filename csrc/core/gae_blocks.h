// Packed advantages by blocks of threads, in two passes, whitening included, however rows fall into sequences.
//
// A token's step is a map of one number and maps compose (gae.h). The first pass composes those of each block's rows;
// the second composes the blocks', then walks the rows again from the true number at each block's right end. Advantages
// are affine in that number too, so sums taken in the first pass give mean and variance before any row is finished.
// No atomics: every sum has one order. N rows, S sequences, P blocks, each with `tiles` tiles of rows.
//
// The text is the same for a GPU and for a test on a CPU. A Team is a block: `each` runs a phase for every thread,
// a Local is a variable of every thread, `down` reads it `offset` lanes to the right, `count` counts lanes of a warp.
#pragma once
#include "gae.h"

namespace rlhf {
inline namespace RLHF_ISA {

constexpr int GAE_LANES = 32, GAE_WARPS = 8, GAE_THREADS = GAE_LANES * GAE_WARPS;
constexpr int GAE_ITEMS = 4;     // consecutive rows of a thread
constexpr int GAE_BLOCKS = 512;  // at most
constexpr int64_t GAE_TILE = GAE_THREADS * GAE_ITEMS;

// Sums over kept rows, as functions of the number x that follows the block: a row's advantage is a + reach x.
struct GaeSums {
  double count = 0, a = 0, reach = 0, a_a = 0, a_reach = 0, reach_reach = 0;

  RLHF_HD void add(const GaeSums& o) {
    count += o.count, a += o.a, reach += o.reach;
    a_a += o.a_a, a_reach += o.a_reach, reach_reach += o.reach_reach;
  }
};

struct GaeBlock {
  GaeMap map;
  GaeSums sums;
};

template <class T>
struct GaeTask {
  const T *rewards, *values;  // [N]
  const int64_t* cu_seqlens;  // [S + 1]
  const bool* mask;           // [N] or null
  const T* bootstrap;         // [S] or null
  T *advantages, *returns;    // [N]
  GaeBlock* blocks;           // [P]
  int64_t rows, sequences, tiles;
  double gamma, gamma_lam, eps;
  bool whiten;

  RLHF_HD int64_t num_blocks() const { return (rows + tiles * GAE_TILE - 1) / (tiles * GAE_TILE); }
};

// How many blocks a call takes: as few tiles each as their number allows.
RLHF_HD int64_t gae_tiles(int64_t rows) { return (rows + GAE_TILE * GAE_BLOCKS - 1) / (GAE_TILE * GAE_BLOCKS); }

struct GaeShared {
  GaeMap maps[GAE_WARPS];
  GaeSums sums[GAE_WARPS];
  double follows;
};

// In: each thread's map. Out: that of all threads to its right, and of the whole block.
template <class Team>
RLHF_HD GaeMap gae_scan(Team& team, typename Team::template Local<GaeMap>& map) {
  typename Team::template Local<GaeMap> other;
  for (int offset = 1; offset < GAE_LANES; offset *= 2) {
    team.down(map, offset, other);
    team.each([&](int i) {
      if (i % GAE_LANES + offset < GAE_LANES) map[i] = map[i].after(other[i]);
    });
  }
  team.each([&](int i) {
    if (i % GAE_LANES == 0) team.shared().maps[i / GAE_LANES] = map[i];
  });
  team.sync();
  team.down(map, 1, other);
  team.each([&](int i) {
    GaeMap right;
    for (int warp = GAE_WARPS - 1; warp > i / GAE_LANES; --warp) right = team.shared().maps[warp].after(right);
    map[i] = i % GAE_LANES == GAE_LANES - 1 ? right : other[i].after(right);
  });
  GaeMap all;
  for (int warp = GAE_WARPS - 1; warp >= 0; --warp) all = team.shared().maps[warp].after(all);
  team.sync();
  return all;
}

template <class Team>
RLHF_HD GaeSums gae_sum(Team& team, typename Team::template Local<GaeSums>& sums) {
  typename Team::template Local<GaeSums> other;
  for (int offset = GAE_LANES / 2; offset > 0; offset /= 2) {
    team.down(sums, offset, other);
    team.each([&](int i) { sums[i].add(other[i]); });  // right in lane 0, which alone is read
  }
  team.each([&](int i) {
    if (i % GAE_LANES == 0) team.shared().sums[i / GAE_LANES] = sums[i];
  });
  team.sync();
  GaeSums all;
  for (int warp = 0; warp < GAE_WARPS; ++warp) all.add(team.shared().sums[warp]);
  team.sync();
  return all;
}

// The sequence of a row for each warp, that is how many end at or before it. A round of 32 looks narrows it 32 times.
template <class T, class Team>
RLHF_HD void gae_search(Team& team, const GaeTask<T>& task, typename Team::template Local<int64_t>& row) {
  typename Team::template Local<int64_t> base, left, step;
  typename Team::template Local<int> passed;
  team.each([&](int i) { base[i] = 0, left[i] = task.sequences; });
  for (int64_t most = task.sequences; most > 0; most = (most + GAE_LANES - 1) / GAE_LANES - 1) {
    team.each([&](int i) {
      step[i] = (left[i] + GAE_LANES - 1) / GAE_LANES;
      int64_t ahead = (i % GAE_LANES + 1) * step[i];
      passed[i] = ahead <= left[i] && task.cu_seqlens[base[i] + ahead] <= row[i];
    });
    team.count(passed);
    team.each([&](int i) {
      int64_t skipped = passed[i] * step[i], rest = left[i] - skipped;
      base[i] += skipped;
      left[i] = step[i] - 1 < rest ? step[i] - 1 : rest;  // below zero once found: nothing is looked at then
    });
  }
  team.each([&](int i) { row[i] = base[i]; });
}

// Consecutive rows of one thread, walked from the right.
template <class T>
struct GaeRows {
  T reward[GAE_ITEMS], value[GAE_ITEMS], bootstrap[GAE_ITEMS];
  bool inside[GAE_ITEMS], kept[GAE_ITEMS], last[GAE_ITEMS];

  // `sequence` .. `high` hold those of the rows.
  RLHF_HD void load(const GaeTask<T>& task, int64_t first, int64_t sequence, int64_t high) {
    const int64_t* ends = task.cu_seqlens + 1;
    while (sequence < high) {
      int64_t middle = sequence + (high - sequence) / 2;
      if (ends[middle] <= first) sequence = middle + 1;
      else high = middle;
    }
    int64_t end = sequence < task.sequences ? ends[sequence] : 0;
    for (int k = 0; k < GAE_ITEMS; ++k) {
      const int64_t t = first + k;
      inside[k] = t < task.rows;
      while (inside[k] && end <= t && sequence < task.sequences) {
        ++sequence;
        end = sequence < task.sequences ? ends[sequence] : 0;
      }
      last[k] = inside[k] && end == t + 1;
      kept[k] = inside[k] && (!task.mask || task.mask[t]);
      reward[k] = kept[k] ? task.rewards[t] : T(0);
      value[k] = kept[k] ? task.values[t] : T(0);
      bootstrap[k] = last[k] && task.bootstrap ? task.bootstrap[sequence] : T(0);
    }
  }

  // What follows row k as a map, given that of what follows row k + 1; `step` then passes the row itself.
  RLHF_HD GaeMap arrive(const GaeTask<T>& task, int k, GaeMap right) const {
    return last[k] ? GaeMap{0, task.gamma * double(bootstrap[k])} : right;
  }
  RLHF_HD GaeMap step(const GaeTask<T>& task, int k, GaeMap here) const {
    return gae_map(reward[k], value[k], kept[k], task.gamma, task.gamma_lam).after(here);
  }
  RLHF_HD GaeMap all(const GaeTask<T>& task) const {
    GaeMap map;
    for (int k = GAE_ITEMS - 1; k >= 0; --k) map = step(task, k, arrive(task, k, map));
    return map;
  }
};

// The rows of one tile, and for each thread the map from what follows the tile to what follows its last row.
template <class T, class Team>
RLHF_HD GaeMap gae_tile(Team& team, const GaeTask<T>& task, int64_t start,
                        typename Team::template Local<GaeRows<T>>& rows, typename Team::template Local<GaeMap>& map) {
  typename Team::template Local<int64_t> low, high;
  constexpr int64_t WARP_ROWS = GAE_LANES * GAE_ITEMS;
  team.each([&](int i) {
    low[i] = start + i / GAE_LANES * WARP_ROWS;
    high[i] = low[i] + WARP_ROWS - 1;
  });
  gae_search(team, task, low);
  gae_search(team, task, high);
  team.each([&](int i) {
    rows[i].load(task, start + i * GAE_ITEMS, low[i], high[i]);
    map[i] = rows[i].all(task);
  });
  return gae_scan(team, map);
}

// First pass, one block.
template <class T, class Team>
RLHF_HD void gae_carry_block(Team& team, const GaeTask<T>& task, int64_t block) {
  typename Team::template Local<GaeRows<T>> rows;
  typename Team::template Local<GaeMap> map;
  typename Team::template Local<GaeSums> sums;
  team.each([&](int i) { sums[i] = GaeSums{}; });
  GaeMap done;  // of the tiles walked so far
  for (int64_t tile = task.tiles - 1; tile >= 0; --tile) {
    const GaeMap whole = gae_tile(team, task, (block * task.tiles + tile) * GAE_TILE, rows, map);
    team.each([&](int i) {
      GaeMap here = map[i].after(done);
      for (int k = GAE_ITEMS - 1; task.whiten && k >= 0; --k) {
        here = rows[i].arrive(task, k, here);
        if (rows[i].kept[k]) {
          const double a = double(rows[i].reward[k]) - double(rows[i].value[k]) + here.value, reach = here.decay;
          sums[i].add({1, a, reach, a * a, a * reach, reach * reach});
        }
        here = rows[i].step(task, k, here);
      }
    });
    done = whole.after(done);
  }
  const GaeSums all = task.whiten ? gae_sum(team, sums) : GaeSums{};
  team.each([&](int i) {
    if (i == 0) task.blocks[block] = {done, all};
  });
}

// Second pass, one block.
template <class T, class Team>
RLHF_HD void gae_block(Team& team, const GaeTask<T>& task, int64_t block) {
  typename Team::template Local<GaeRows<T>> rows;
  typename Team::template Local<GaeMap> map;
  typename Team::template Local<GaeSums> sums;
  constexpr int PER_THREAD = GAE_BLOCKS / GAE_THREADS;
  const int64_t blocks = task.num_blocks();
  team.each([&](int i) {
    GaeMap own;
    for (int64_t b = i * PER_THREAD + PER_THREAD - 1; b >= i * PER_THREAD; --b)
      if (b < blocks) own = task.blocks[b].map.after(own);
    map[i] = own;
  });
  gae_scan(team, map);
  team.each([&](int i) {
    double follows = map[i](0);
    sums[i] = GaeSums{};
    for (int64_t b = i * PER_THREAD + PER_THREAD - 1; b >= i * PER_THREAD; --b) {
      if (b >= blocks) continue;
      if (b == block) team.shared().follows = follows;
      if (task.whiten) {
        const GaeSums s = task.blocks[b].sums;
        const double x = s.reach == 0 ? 0 : follows;  // what reaches no row may be infinite
        sums[i].add({s.count, s.a + x * s.reach, 0, s.a_a + x * (2 * s.a_reach + x * s.reach_reach), 0, 0});
      }
      follows = task.blocks[b].map(follows);
    }
  });
  double mean = 0, scale = 1;
  if (task.whiten) {
    const GaeSums all = gae_sum(team, sums);
    const double count = all.count > 1 ? all.count : 1;
    mean = all.a / count;
    const double variance = all.a_a / count - mean * mean;
    scale = 1 / sqrt((variance < 0 ? 0 : variance) + task.eps);
  }
  team.sync();
  double follows = team.shared().follows;
  for (int64_t tile = task.tiles - 1; tile >= 0; --tile) {
    const int64_t start = (block * task.tiles + tile) * GAE_TILE;
    const GaeMap whole = gae_tile(team, task, start, rows, map);
    team.each([&](int i) {
      GaeMap here{0, map[i](follows)};
      for (int k = GAE_ITEMS - 1; k >= 0; --k) {
        here = rows[i].arrive(task, k, here);
        const double result = double(rows[i].reward[k]) + here.value;
        const int64_t t = start + i * GAE_ITEMS + k;
        if (rows[i].inside[k]) {
          const double advantage = (result - double(rows[i].value[k]) - mean) * scale;
          task.returns[t] = rows[i].kept[k] ? T(result) : T(0);
          task.advantages[t] = rows[i].kept[k] ? T(advantage) : T(0);
        }
        here = rows[i].step(task, k, here);
      }
    });
    follows = whole(follows);
  }
}

}  // namespace RLHF_ISA
}  // namespace rlhf
