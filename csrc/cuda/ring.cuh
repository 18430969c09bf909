// A row on its way through shared memory: which part of it is this block's, in which order its chunks come and are
// used.
#pragma once
#include "async.cuh"
#include "row_args.h"
#include "vec.cuh"

namespace gk {

// A row's vectors in chunks, of which each block of the cluster takes a run. The first block takes head and tail.
template <typename T> struct Share {
  const T* logits;
  Cut<T> row;
  int first_vector, own_vectors;  // of this block
  int chunks;

  __device__ Share(const T* logits, Cut<T> row, int vectors_per_chunk, int rank, int cluster)
      : logits(logits), row(row) {
    const int all = (row.vectors + vectors_per_chunk - 1) / vectors_per_chunk, each = (all + cluster - 1) / cluster;
    first_vector = min_(rank * each * vectors_per_chunk, row.vectors);
    own_vectors = min_(each * vectors_per_chunk, row.vectors - first_vector);
    chunks = (own_vectors + vectors_per_chunk - 1) / vectors_per_chunk;
  }
  __device__ int column(int vector) const { return row.head + (first_vector + vector) * kPerVector<T>; }
};

// The order in which a row's chunks are loaded and, in the second sweep, used. The ring's chunks come one after the
// other through its slots; the last `kept` of them are still there for the second sweep, which therefore begins with
// them, goes on with those it has to load again, backwards, and ends with the residents. A row that fits is all kept.
struct Order {
  int chunks, resident, kept;
  __device__ Order(int chunks, int slots, int resident_slots, bool twice) : chunks(chunks) {
    resident = twice ? min_(resident_slots, chunks) : 0;
    kept = twice ? min_(slots - resident_slots, chunks - resident) : chunks;
  }
  __device__ int through_ring() const { return chunks - resident; }
  __device__ int again() const { return through_ring() - kept; }
  __device__ bool lost(int chunk) const { return chunk >= resident && chunk < chunks - kept; }
  __device__ int load(int i) const { return i < chunks ? i : 2 * chunks - kept - 1 - i; }  // i < chunks + again()
  __device__ int second_use(int i) const {
    return i < kept ? chunks - kept + i : i < through_ring() ? chunks - 1 - i : i - through_ring();
  }
};

// Both sides, the warp that loads and those that compute, walk through the same loads.
struct Ring {
  unsigned char* data;
  Mbarrier *full, *empty;
  int chunk_bytes, resident, size;  // the ring's slots, `size`, lie behind the resident ones
  int next = 0;                     // of the ring's slots
  unsigned phases = 0;              // of each slot's barriers: a bit flips with every load

  __device__ Ring(unsigned char* shared, int slots, int resident, int chunk_bytes)
      : data(shared),
        full(reinterpret_cast<Mbarrier*>(shared + int64_t(slots) * chunk_bytes)),
        empty(full + slots),
        chunk_bytes(chunk_bytes),
        resident(resident),
        size(slots - resident) {}

  __device__ void* control() const { return empty + resident + size; }
  __device__ unsigned char* at(int slot) const { return data + int64_t(slot) * chunk_bytes; }
  __device__ int phase(int slot) const { return int(phases >> slot & 1u); }
  __device__ void flip(int slot) { phases ^= 1u << slot; }
  // The slot of a chunk that is next in the order; `cursor`: a place in the ring.
  __device__ int slot_of(int chunk, const Order& order, int& cursor) const {
    if (chunk < order.resident) return chunk;
    const int slot = resident + cursor;
    cursor = cursor + 1 == size ? 0 : cursor + 1;
    return slot;
  }
  __device__ int behind(int cursor, int by) const { return (cursor + by) % size; }
};

}  // namespace gk
