// Sequences of any lengths, cut into tiles of equal size; a block works on one tile. Tiles are numbered without knowing
// the lengths on the host, so there is no host sync; some numbers have no tokens.
#pragma once
#include "../kernels.h"

namespace gk {

struct SequenceTile {
  int64_t sequence, row;                 // its batch row
  int64_t begin, end;                    // tokens of that row
  int64_t first_tile, index, num_tiles;  // the sequence's first tile; which of its tiles this is, of how many
  bool in_sequence;                      // false: past the last boundary, where tokens belong to no sequence
  __device__ int64_t size() const { return end - begin; }
};

GK_HD int64_t tiles_per_row(int64_t tokens) { return max_<int64_t>((tokens + kTokensPerTile - 1) / kTokensPerTile, 1); }

// The number of tiles to launch, at least 1: an upper bound where the lengths are on the device.
inline int64_t sequence_tile_count(int64_t batch, int64_t tokens, const int64_t* cu_seqlens, int64_t sequences) {
  return cu_seqlens ? sequences + 1 + tokens / kTokensPerTile : max_<int64_t>(batch * tiles_per_row(tokens), 1);
}

// The sequences of flat tokens. Their boundaries are on the device, unchecked, and whatever they are, the sequences
// must be disjoint, in order and within the tokens: otherwise a kernel writes out of bounds, or waits for tiles that no
// block takes. So each boundary is clamped to the range that the search for it has left, which changes nothing if they
// rise from 0 to at most `tokens`. The first one is ignored and taken as 0.
struct Boundaries {
  const int64_t* cu_seqlens;  // [sequences + 1]
  int64_t sequences, tokens;

  struct Span {
    int64_t sequence, begin, end;
    __device__ int64_t size() const { return end - begin; }
  };

  // The last sequence for which reached(sequence, its begin), which is monotonic; `sequences` stands for the tokens
  // after the last one.
  template <typename Reached> __device__ Span last(const Reached& reached) const {
    Span span{0, 0, tokens};
    for (int64_t after = sequences + 1; after - span.sequence > 1;) {
      const int64_t middle = span.sequence + (after - span.sequence) / 2;
      const int64_t bound = clamp_(cu_seqlens[middle], span.begin, span.end);
      if (reached(middle, bound))
        span.sequence = middle, span.begin = bound;
      else
        after = middle, span.end = bound;
    }
    return span;
  }
  __device__ Span operator[](int64_t sequence) const {
    return last([=](int64_t s, int64_t) { return s <= sequence; });
  }
};

struct SequenceTiles {
  const int64_t* cu_seqlens;  // null: one sequence per batch row
  int64_t sequences, tokens;  // tokens of a batch row

  __device__ SequenceTile operator[](int64_t tile_id) const { return cu_seqlens ? packed(tile_id) : padded(tile_id); }

 private:
  // The number of a sequence's first tile: monotonic, and with room for all of its tokens.
  __device__ static int64_t first_tile_of(int64_t sequence, int64_t begin) { return sequence + begin / kTokensPerTile; }

  __device__ SequenceTile padded(int64_t tile_id) const {
    const int64_t num_tiles = tiles_per_row(tokens), row = tile_id / num_tiles;
    if (row >= sequences) return {};  // a launch of no tokens
    return cut({row, 0, tokens}, row, row * num_tiles, tile_id, true);
  }
  __device__ SequenceTile packed(int64_t tile_id) const {
    const auto reached = [=](int64_t s, int64_t begin) { return first_tile_of(s, begin) <= tile_id; };
    const Boundaries::Span span = Boundaries{cu_seqlens, sequences, tokens}.last(reached);
    return cut(span, 0, first_tile_of(span.sequence, span.begin), tile_id, span.sequence < sequences);
  }
  __device__ static SequenceTile cut(const Boundaries::Span& span, int64_t row, int64_t first_tile, int64_t tile_id,
                                     bool in_sequence) {
    const int64_t index = tile_id - first_tile, from = span.begin + index * kTokensPerTile;
    const int64_t to = min_(from + kTokensPerTile, span.end),
                  num_tiles = (span.size() + kTokensPerTile - 1) / kTokensPerTile;
    return {span.sequence, row, from, max_(from, to), first_tile, index, num_tiles, in_sequence};
  }
};

}  // namespace gk
