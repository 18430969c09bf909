// Sequences of any lengths, cut into pieces of equal size: the work of a block. Pieces are numbered without knowing the
// lengths on the host, so that nothing waits for the device; some numbers have no tokens.
#pragma once
#include "../kernels.h"

namespace gk {

struct Piece {
  int64_t sequence, row;           // its batch row
  int64_t begin, end;              // tokens of that row
  int64_t first, index, siblings;  // the sequence's first piece; which of its pieces this is, of how many
  bool inside;                     // false: past the last boundary, where tokens belong to no sequence
  __device__ int64_t size() const { return end - begin; }
};

GK_HD int64_t pieces_of_row(int64_t tokens) { return max_<int64_t>((tokens + kTokensAPiece - 1) / kTokensAPiece, 1); }

// At least 1.
inline int64_t piece_count(int64_t batch, int64_t tokens, const int64_t* cu_seqlens, int64_t sequences) {
  return cu_seqlens ? sequences + 1 + tokens / kTokensAPiece : max_<int64_t>(batch * pieces_of_row(tokens), 1);
}

struct Pieces {
  const int64_t* cu_seqlens;  // null: one sequence a batch row
  int64_t sequences, tokens;  // tokens of a batch row

  __device__ Piece operator[](int64_t slot) const { return cu_seqlens ? packed(slot) : padded(slot); }

  // The pieces of sequence s begin at s + cu[s] / size: monotonous, and never too few for its tokens.
  __device__ int64_t first_of(int64_t s) const { return s + cu_seqlens[s] / kTokensAPiece; }

 private:
  __device__ Piece padded(int64_t slot) const {
    const int64_t siblings = pieces_of_row(tokens), row = slot / siblings;
    if (row >= sequences) return {};  // a launch of no tokens
    return cut(row, row, 0, tokens, row * siblings, slot - row * siblings, true);
  }
  __device__ Piece packed(int64_t slot) const {
    int64_t s = 0;  // the last sequence that begins at `slot` or before; `sequences`: the tokens behind them
    for (int64_t after = sequences + 1; after - s > 1;) {
      const int64_t middle = s + (after - s) / 2;
      if (first_of(middle) <= slot)
        s = middle;
      else
        after = middle;
    }
    const bool inside = s < sequences;
    const int64_t first = first_of(s);
    return cut(s, 0, cu_seqlens[s], inside ? cu_seqlens[s + 1] : tokens, first, slot - first, inside);
  }
  __device__ static Piece cut(int64_t sequence, int64_t row, int64_t begin, int64_t end, int64_t first, int64_t index,
                              bool inside) {
    const int64_t from = begin + index * kTokensAPiece, to = min_(from + kTokensAPiece, end);
    return {sequence, row, from, max_(from, to), first, index, (end - begin + kTokensAPiece - 1) / kTokensAPiece,
            inside};
  }
};

}  // namespace gk
