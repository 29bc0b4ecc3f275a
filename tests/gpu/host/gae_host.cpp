// The blocks of csrc/core/gae_blocks.h with a loop for the threads: what a GPU computes, on a CPU.
#include <vector>

#include "../../../csrc/core/gae_blocks.h"

using namespace rlhf;

namespace {

struct Team {
  template <class X>
  struct Local {
    std::vector<X> of = std::vector<X>(GAE_THREADS);
    X& operator[](int i) { return of[i]; }
  };

  template <class F>
  void each(F phase) {
    for (int i = 0; i < GAE_THREADS; ++i) phase(i);
  }

  template <class X>
  void down(Local<X>& from, int offset, Local<X>& to) {
    for (int i = 0; i < GAE_THREADS; ++i) to[i] = from[i % GAE_LANES + offset < GAE_LANES ? i + offset : i];
  }

  void count(Local<int>& yes) {
    for (int warp = 0; warp < GAE_WARPS; ++warp) {
      int all = 0;
      for (int lane = 0; lane < GAE_LANES; ++lane) all += yes[warp * GAE_LANES + lane];
      for (int lane = 0; lane < GAE_LANES; ++lane) yes[warp * GAE_LANES + lane] = all;
    }
  }

  GaeShared& shared() { return memory; }
  void sync() {}

  GaeShared memory;
};

template <class T>
void run(GaeTask<T> task) {
  std::vector<GaeBlock> blocks(task.num_blocks());
  task.blocks = blocks.data();
  Team team;
  for (int64_t b = 0; b < task.num_blocks(); ++b) gae_carry_block(team, task, b);
  for (int64_t b = task.num_blocks() - 1; b >= 0; --b) gae_block(team, task, b);
}

template <class T>
GaeTask<T> task_of(void* const* at, int64_t rows, int64_t sequences, int64_t tiles, const double* numbers) {
  auto* in = reinterpret_cast<T* const*>(at);
  return {in[0], in[1], static_cast<const int64_t*>(at[2]), static_cast<const bool*>(at[3]), in[4], in[5], in[6],
          nullptr, rows, sequences, tiles, numbers[0], numbers[1], numbers[2], numbers[2] > 0};
}

}  // namespace

// rewards, values, cu_seqlens, mask, bootstrap, advantages, returns; gamma, gamma lam, eps (zero: not whitened).
extern "C" void gae_on_host(bool wide, void* const* at, int64_t rows, int64_t sequences, int64_t tiles,
                            const double* numbers) {
  tiles = tiles ? tiles : gae_tiles(rows);
  if (wide) run(task_of<double>(at, rows, sequences, tiles, numbers));
  else run(task_of<float>(at, rows, sequences, tiles, numbers));
}
