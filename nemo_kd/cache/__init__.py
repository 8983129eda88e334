"""The cache: teacher rows of every sample, written once, read at training speed.

    cache/
      manifest.json               what shaped the cache (Manifest), sealed JSON
      shard-00000/                samples_per_shard consecutive samples, the last shard the rest
        shard.json                counts, and size and xxh3_128 of every file, sealed JSON
        tokens.{bin,idx}          int32   [T]    the sample's ids
        loss_mask.{bin,idx}       uint8   [T]    1 where the token is to be predicted, never at t=0
        context_length.{bin,idx}  int32   [1]    tokens of the prompt
        row_lengths.{bin,idx}     uint8+  [P]    entries of each row, if rows are ragged
        topk_ids.{bin,idx}        uint16  [E]    codec raw; int32 for a vocabulary above 65,536
        topk_log_probs.{bin,idx}  uint16  [E]    codec raw: float16 bits
        tail_log_probs.{bin,idx}  uint16  [P]    codec raw: float16 bits
        packed_rows.{bin,idx}     uint8   [...]  codec packed, in place of these three

All numbers are little-endian. P is the number of ones in loss_mask: row j belongs to the j-th of
them, at position t, and holds the teacher's distribution at t - 1. The entries of all rows follow
each other, E in all. A row has selection.k of them (see the manifest), or as many as row_lengths
says (uint8, uint16 or int32, the smallest that holds the longest). docs/format.md has the bytes of
packed_rows.

A pair is a Megatron IndexedDataset. For each sample it has one sequence, in a document of its own:

    .bin  the sequences one after the other; if all are empty, one zero element that no sequence
          refers to, because an empty file cannot be mapped
    .idx  "MMIDIDX\\0\\0" | u64 version 1 | u8 element type | u64 n | u64 n + 1
          | n x i32 length in elements | n x i64 offset in bytes | (n + 1) x i64 0..n

IndexedDataset has no float16, so that the bits of a log-prob's float16 are stored in a uint16. A
finite log-prob below -65504 is stored as -65504; -inf stays -inf.

Sealed JSON has sorted keys, two spaces of indent, a newline at the end, and a key `xxh3_128`: the
hash of the same text without that key. shard.json also carries the hash of its manifest.
No file of a finished cache holds a time, a host or a rank. A name that starts with .tmp is a shard
being written, a claim on one, or what a killed writer left behind.
"""

from nemo_kd.cache.layout import Sample
from nemo_kd.cache.manifest import Manifest, SourceFile
from nemo_kd.cache.reader import TopKCache
from nemo_kd.cache.writer import CacheWriter

__all__ = ["CacheWriter", "Manifest", "Sample", "SourceFile", "TopKCache"]
