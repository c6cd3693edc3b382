"""Documents → tokenised, packed, memory-mapped blocks, and the order in which training reads them.

    blocks = tokenise(documents("corpus/"), tokenizer, block_size=512, to=Path("run/text"), label="corpus/")
    tokens_BS, positions_BS = blocks.batch(batch_indices(step, 8, len(blocks), seed=0))

Shapes: N blocks, B batch, S tokens of a block, T tokens of a stream.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prunus.errors import BadData, UnsupportedModel
from prunus.files import atomic_folder

MIN_BLOCKS = 2  # one to train on and one to judge by
PIECE_CHARACTERS = 250_000  # of one call to the tokenizer: its lists of offsets take ~100 bytes per token
HASHED_BLOCKS = 4096  # read from disk at a time


@dataclass(frozen=True, eq=False)
class Blocks:
    """Packed text. The arrays stay on disk until a batch is asked for.

    Attributes:
        tokens: uint16 or uint32 [N, S].
        positions: uint16 or uint32 [N, S], place of each token in its document. It restarts at 0 where a document
            starts and where a block starts: what came before the block is not visible.
        bytes_per_block: int64 [N], UTF-8 bytes of the text that each block's tokens stand for. A character split over
            several tokens counts for the first; special tokens count 0.
        source: where the text came from, for reports.
    """

    tokens: np.ndarray
    positions: np.ndarray
    bytes_per_block: np.ndarray
    source: str

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def block_size(self) -> int:
        return self.tokens.shape[1]

    @property
    def num_tokens(self) -> int:
        return self.tokens.size

    @property
    def num_bytes(self) -> int:
        """Bits per byte = mean nats per predicted token × num_tokens / num_bytes / ln 2."""
        return int(self.bytes_per_block.sum())

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 over tokens and positions: names this text in caches and reports. Reads everything once."""
        digest = hashlib.sha256()
        for array, start in itertools.product((self.tokens, self.positions), range(0, len(self), HASHED_BLOCKS)):
            digest.update(array[start : start + HASHED_BLOCKS].tobytes())
        return digest.hexdigest()

    def batch(self, indices: Sequence[int] | np.ndarray) -> tuple[Tensor, Tensor]:
        """int64 tokens_BS and positions_BS of the blocks `indices`."""
        rows = np.asarray(indices, dtype=np.int64)
        tokens_BS, positions_BS = (array[rows].astype(np.int64) for array in (self.tokens, self.positions))
        return torch.from_numpy(tokens_BS), torch.from_numpy(positions_BS)

    def head(self, num_blocks: int) -> Blocks:
        """The first `num_blocks` blocks (all, where there are fewer); still on disk."""
        return self._rows(slice(num_blocks))

    def select(self, indices: Sequence[int] | np.ndarray) -> Blocks:
        """The blocks `indices`, in that order, copied into memory."""
        return self._rows(np.asarray(indices, dtype=np.int64))

    def _rows(self, rows: slice | np.ndarray) -> Blocks:
        return replace(
            self,
            tokens=self.tokens[rows],
            positions=self.positions[rows],
            bytes_per_block=self.bytes_per_block[rows],
        )


def targets(tokens_BS: Tensor, positions_BS: Tensor) -> Tensor:
    """Where predicting the next token is meaningful: it lies in the same block and the same document.

    Returns:
        bool [B, S]; True at s where the prediction of token s + 1 from token s counts. Always False at the last s.
    """
    mask_BS = torch.zeros_like(tokens_BS, dtype=torch.bool)
    mask_BS[:, :-1] = positions_BS[:, 1:] == positions_BS[:, :-1] + 1
    return mask_BS


def tokenise(
    docs: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    block_size: int,
    max_tokens: int | None = None,
    to: Path,
    label: str,
    progress: Callable[[int], None] | None = None,
) -> Blocks:
    """Tokenise documents, each closed by the end-of-text token, and pack them back to back into blocks on disk.

    The last, incomplete block is dropped. A document of more than PIECE_CHARACTERS is packed as several.

    Args:
        max_tokens: stop reading there.
        to: folder that is written whole, or not at all.
        label: name of the source, for reports and errors.
        progress: called with the number of tokens so far.
    Raises:
        BadData: too little text for MIN_BLOCKS blocks.
        UnsupportedModel: the tokenizer is not a fast one, so which token stands for which bytes is not known.
    """
    if not tokenizer.is_fast:
        raise UnsupportedModel(
            f"{type(tokenizer).__name__} is a slow tokenizer, which does not tell the bytes of a token. "
            "Give the model folder a tokenizer.json."
        )
    with atomic_folder(to) as partial:
        bytes_N = _pack(docs, tokenizer, partial, block_size, max_tokens, label, progress)
        np.save(partial / "bytes.npy", bytes_N)
        manifest = {"source": label, "num_blocks": len(bytes_N), "block_size": block_size}
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=2, ensure_ascii=False))
    return load_blocks(to)


def load_blocks(folder: Path) -> Blocks:
    """Open what `tokenise` wrote.

    Raises:
        BadData: not such a folder, or a file in it is missing or truncated.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        tokens, positions = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("tokens", "positions"))
        bytes_N = np.load(folder / "bytes.npy")
        shape = (manifest["num_blocks"], manifest["block_size"])
        if not (tokens.shape == positions.shape == shape and bytes_N.shape == shape[:1]):
            raise ValueError(f"its arrays are not {shape}")
        return Blocks(tokens, positions, bytes_N, manifest["source"])
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise BadData(
            f"{folder}: not a folder of tokenised text, or a damaged one ({error}). Delete it and tokenise again."
        ) from error


def _pack(
    docs: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    block_size: int,
    max_tokens: int | None,
    label: str,
    progress: Callable[[int], None] | None,
) -> np.ndarray:
    """Write tokens.npy and positions.npy; returns int64 [N], the bytes of each block."""
    num_ids = max(tokenizer.get_vocab().values()) + 1
    token_dtype = np.dtype("<u2" if num_ids <= 2**16 else "<u4")
    position_dtype = np.dtype("<u2" if block_size <= 2**16 else "<u4")
    bos = _leading(tokenizer)
    num_tokens, rest_3T, bytes_N = 0, np.empty((3, 0), dtype=np.int64), np.empty(0, dtype=np.int64)
    with (
        _growing_npy(folder / "tokens.npy", token_dtype, block_size) as write_tokens,
        _growing_npy(folder / "positions.npy", position_dtype, block_size) as write_positions,
    ):
        for batch_3T in _encoded(docs, tokenizer):
            batch_3T = batch_3T[:, : None if max_tokens is None else max_tokens - num_tokens]
            num_tokens += batch_3T.shape[1]
            (tokens_NS, places_NS, bytes_NS), rest_3T = _cut(
                np.concatenate([rest_3T, batch_3T], axis=1), block_size, bos
            )
            write_tokens(tokens_NS)
            write_positions(np.minimum(places_NS, np.arange(block_size)))
            bytes_N = np.concatenate([bytes_N, bytes_NS.sum(axis=1)])
            if progress is not None:
                progress(num_tokens)
            if num_tokens == max_tokens:
                break
    if len(bytes_N) < MIN_BLOCKS:
        limit = f" (max_tokens={max_tokens:,})" if num_tokens == max_tokens else ""
        raise BadData(
            f"{label}: too short, {num_tokens:,} tokens{limit}; at least {MIN_BLOCKS * block_size:,} are needed "
            f"({MIN_BLOCKS} blocks of {block_size:,}). Give more text, or a smaller block size."
        )
    return bytes_N


def _leading(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id that the tokenizer puts before every text, if any."""
    bos = tokenizer.bos_token_id
    return bos if bos is not None and tokenizer("a")["input_ids"][0] == bos else None


def _cut(stream_3T: np.ndarray, block_size: int, bos: int | None) -> tuple[np.ndarray, np.ndarray]:
    """[3, N, S] whole blocks, and what is left.

    With `bos` a block that goes on with a document starts with it too: models trained so (Gemma) are lost without it.
    """
    if bos is None or block_size < 2:
        whole = stream_3T.shape[1] // block_size * block_size
        return stream_3T[:, :whole].reshape(3, -1, block_size), stream_3T[:, whole:]
    lead_31, blocks, start = np.array([[bos], [0], [0]]), [np.empty((3, 0), dtype=np.int64)], 0
    while stream_3T.shape[1] - start >= block_size:
        has_one = stream_3T[0, start] == bos
        stop = start + block_size - (not has_one)
        blocks += [stream_3T[:, start:stop]] if has_one else [lead_31, stream_3T[:, start:stop]]
        start = stop
    return np.concatenate(blocks, axis=1).reshape(3, -1, block_size), stream_3T[:, start:]


def _encoded(docs: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[np.ndarray]:
    """int64 [3, T] for each batch of documents: token, its place in its document, UTF-8 bytes that it stands for."""
    for batch in _batches(itertools.chain.from_iterable(map(_pieces, docs))):
        encoding = tokenizer(
            batch,
            add_special_tokens=True,
            truncation=False,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=True,
            verbose=False,  # a document may be longer than the model's context: it is cut into blocks
        )
        per_document = zip(batch, encoding["input_ids"], encoding["offset_mapping"], strict=True)
        yield np.concatenate([_with_eos(*one, tokenizer.eos_token_id) for one in per_document], axis=1)


def _with_eos(document: str, ids: list[int], offsets: list[tuple[int, int]], eos: int | None) -> np.ndarray:
    """int64 [3, T] of one document, see `_encoded`."""
    bytes_T = _bytes_of_tokens(document, offsets)
    if eos is not None and ids[-1:] != [eos]:
        ids, bytes_T = [*ids, eos], np.append(bytes_T, 0)
    return np.stack([np.asarray(ids, dtype=np.int64), np.arange(len(ids)), bytes_T])


def _bytes_of_tokens(document: str, offsets: list[tuple[int, int]]) -> np.ndarray:
    """int64 [T] that sums to the document's length in UTF-8.

    A token takes what lies between the end of the one before and its own end, so that spaces that the tokenizer drops
    are counted; the last takes what is left. Special tokens have the offsets (0, 0), hence the running maximum.
    """
    ends_T = np.maximum.accumulate(np.fromiter((end for _, end in offsets), dtype=np.int64, count=len(offsets)))
    ends_T[-1:] = len(document)
    if not document.isascii():
        codes = np.frombuffer(document.encode("utf-32-le"), dtype="<u4")
        length = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000).astype(np.int64)
        ends_T = np.concatenate([[0], np.cumsum(length)])[ends_T]
    return np.diff(ends_T, prepend=0)


def _pieces(document: str) -> Iterator[str]:
    """A document in parts of at most PIECE_CHARACTERS, cut at the last line end, or else space, before that."""
    start = 0
    while len(document) - start > PIECE_CHARACTERS:
        end = start + PIECE_CHARACTERS
        cuts = (document.rfind(mark, start, end) + 1 for mark in ("\n", " "))
        cut = next(filter(None, cuts), end)
        yield document[start:cut]
        start = cut
    yield document[start:]


def _batches(pieces: Iterable[str]) -> Iterator[list[str]]:
    """Lists of at least PIECE_CHARACTERS characters, but for the last."""
    batch: list[str] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece)
        if size >= PIECE_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@contextlib.contextmanager
def _growing_npy(file: Path, dtype: np.dtype, block_size: int) -> Iterator[Callable[[np.ndarray], None]]:
    """An .npy file that rows are appended to. numpy's header leaves room for the number of rows to be filled in."""
    rows = 0

    def write_header() -> None:
        header = {"descr": dtype.str, "fortran_order": False, "shape": (rows, block_size)}
        np.lib.format.write_array_header_1_0(stream, header)

    def append(rows_NS: np.ndarray) -> None:
        nonlocal rows
        stream.write(rows_NS.astype(dtype).tobytes())
        rows += len(rows_NS)

    with file.open("wb") as stream:
        write_header()
        yield append
        stream.seek(0)
        write_header()


# ---------------------------------------------------------------------------------------------- order


@functools.lru_cache(maxsize=2)
def order(num_blocks: int, *, seed: int, epoch: int) -> np.ndarray:
    """Permutation int64 [num_blocks] of one epoch, a function of its arguments alone. Read-only, as it is cached."""
    permutation = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64))).permutation(num_blocks)
    permutation.flags.writeable = False
    return permutation


def batch_indices(step: int, batch_size: int, num_blocks: int, seed: int) -> list[int]:
    """Blocks of global step `step`: batches follow each other through the epochs, nothing dropped at their ends.

    The state of the data is `step`. A rank of several takes its share of the list, so any world size reads the same.
    """
    places = range(step * batch_size, (step + 1) * batch_size)
    epochs_and_offsets = (divmod(place, num_blocks) for place in places)
    return [int(order(num_blocks, seed=seed, epoch=epoch)[offset]) for epoch, offset in epochs_and_offsets]
