// Advantages of packed sequences, each walked from its end. A step waits for the one before it, so a thread walks
// several sequences at once; each keeps its own arithmetic, whoever its neighbours are.
#include "../core/gae.h"

#include "kernels.h"

namespace rlhf {
namespace {

constexpr int LANES = 4;      // sequences walked at once
constexpr int64_t GROUP = 8;  // sequences handed to a thread at once

// A sequence on its way: tokens `begin` .. `next` are still to come, the last one first.
struct Walk {
  int64_t begin = 0, next = -1;
  GaeCarry carry{0, 0};
};

template <class T, bool MASKED>
class Group {
 public:
  Group(const GaeCall& call, int64_t first, int64_t last)
      : c(call),
        rewards(static_cast<const T*>(call.rewards)),
        values(static_cast<const T*>(call.values)),
        bootstrap(static_cast<const T*>(call.bootstrap)),
        advantages(static_cast<T*>(call.advantages)),
        returns(static_cast<T*>(call.returns)),
        coming(first),
        end(last) {}

  void run() {
    Walk walks[LANES];
    for (;;) {
      int64_t together = INT64_MAX, alone = -1;
      for (int lane = 0; lane < LANES; ++lane) {
        while (walks[lane].next < walks[lane].begin && coming < end) walks[lane] = start(coming++);
        int64_t left = walks[lane].next - walks[lane].begin + 1;
        together = left < together ? left : together;
        if (left > 0) alone = lane;
      }
      if (together > 0) {
        steps(walks, together);
      } else if (alone >= 0) {
        Walk& walk = walks[alone];
        while (walk.next >= walk.begin) step(walk);
      } else {
        return;
      }
    }
  }

 private:
  Walk start(int64_t s) const {
    return {c.cu_seqlens[s], c.cu_seqlens[s + 1] - 1, {0, bootstrap ? double(bootstrap[s]) : 0}};
  }

  void steps(Walk (&walks)[LANES], int64_t count) const {
    Walk a = walks[0], b = walks[1], c = walks[2], d = walks[3];  // registers; an array would live in memory
    for (int64_t i = 0; i < count; ++i) step(a), step(b), step(c), step(d);
    walks[0] = a, walks[1] = b, walks[2] = c, walks[3] = d;
  }

  void step(Walk& walk) const {
    const int64_t t = walk.next--;
    const bool kept = !MASKED || c.mask[t];
    walk.carry = gae_step(walk.carry, rewards[t], values[t], kept, c.gamma, c.gamma * c.lam);
    advantages[t] = kept ? T(walk.carry.advantage) : T(0);
    returns[t] = kept ? T(walk.carry.advantage + values[t]) : T(0);
  }

  const GaeCall c;
  const T *const rewards, *const values, *const bootstrap;
  T *const advantages, *const returns;
  int64_t coming, end;
};

template <class T>
void all(const GaeCall& c) {
#pragma omp parallel for schedule(dynamic) num_threads(c.threads)
  for (int64_t first = 0; first < c.sequences; first += GROUP) {
    int64_t last = first + GROUP < c.sequences ? first + GROUP : c.sequences;
    c.mask ? Group<T, true>(c, first, last).run() : Group<T, false>(c, first, last).run();
  }
}

}  // namespace

void gae(const GaeCall& c, bool wide) { wide ? all<double>(c) : all<float>(c); }

}  // namespace rlhf
