"""Real text as bytes: a folder's files as documents, split into training and held-out, served in sequences.

Nothing is downloaded and nothing is tokenised: a token is a byte, and byte 0 begins a document. All of it lives in
memory, on every rank. Which sequences make up step s is a function of the seed and s alone, so the position in the data
is the number of steps done.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BEGIN = b"\0"
SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"}
OPEN_ROWS = 32  # rows that a packer fills at a time

Row = list[tuple[int, int]]  # (start, length) of the pieces of text that make up one sequence


class Documents(NamedTuple):
    """Documents behind one another: text is uint8 (N,), starts int64 (documents + 1,), from 0 to N."""

    text: np.ndarray
    starts: np.ndarray

    def __str__(self) -> str:
        return f"{len(self.starts) - 1:,} documents ({len(self.text) / 1e6:.1f} MB)"

    def digest(self) -> str:
        return hashlib.sha256(self.text.tobytes()).hexdigest()[:16]


class Batch(NamedTuple):
    """A step's sequences for one group of ranks, whole: tokens and labels int64 (B, S); packed (1, T), with cu_seqlens.

    `step_tokens` counts the tokens of all groups.
    """

    tokens: Tensor
    labels: Tensor
    cu_seqlens: list[int] | None
    step_tokens: int


def python_sources() -> Path:
    """The folder of the running Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def read_documents(folder: Path, pattern: str, held_out: float = 0.1) -> tuple[Documents, Documents]:
    """Training and held-out documents: every file below `folder` whose name matches `pattern`, in order of its path.

    A file is held out by the hash of its contents, so that the split depends on nothing else and two copies of a file
    never end up on both sides. Folders of tests, of installed packages and hidden ones are left out.

    Raises:
        ValueError: no such folder, or no text on one of the sides.
    """
    if not folder.is_dir():
        raise ValueError(f"--data is {folder}: expected a folder of text files")
    sides: tuple[list[bytes], list[bytes]] = ([], [])
    for path in _files(folder, pattern):
        contents = path.read_bytes()
        share = int.from_bytes(hashlib.sha256(contents).digest()[:4], "big") / 2**32
        sides[share < held_out].append(BEGIN + contents)
    if not all(sides):
        raise ValueError(
            f"{folder} has {len(sides[0])} files {pattern!r} to train on and {len(sides[1])} to hold out: expected "
            "some of each; give a folder with more files, or another --glob"
        )
    training, held_out_documents = (_concatenated(documents) for documents in sides)
    return training, held_out_documents


def _files(folder: Path, pattern: str) -> Iterator[Path]:
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in SKIPPED_FOLDERS and not name.startswith("."))
        yield from (Path(where, name) for name in sorted(names) if fnmatch(name, pattern))


def _concatenated(documents: list[bytes]) -> Documents:
    starts = np.cumsum([0] + [len(document) for document in documents])
    return Documents(np.frombuffer(b"".join(documents), np.uint8), starts)


class Sequences:
    """Sequences of `seqlen` tokens in batches of `size`, dealt to `groups` groups of ranks; this one is `group`.

    Args:
        packing: False: windows of the text, each one a sequence of exactly seqlen tokens in which attention crosses
            from document to document. True: whole documents, as many as fit into seqlen; attention stays inside each
            one. Only documents longer than seqlen are cut.

    Raises:
        ValueError: the text is too short to give every group a sequence.
    """

    def __init__(
        self, documents: Documents, seqlen: int, packing: bool, size: int, group: int = 0, groups: int = 1,
        seed: int = 0,
    ) -> None:
        self.text, self.packing, self.seed = documents.text, packing, seed
        self.size, self.group, self.groups = size, group, groups
        self.rows = _packed_rows(documents, seqlen, seed) if packing else _windows(documents, seqlen)
        if len(self.rows) < groups:
            raise ValueError(
                f"--seqlen is {seqlen} and a side of the text has {len(documents.text)} bytes: expected text for "
                f"{groups} sequences or more"
            )
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def step(self, step: int) -> Batch:
        """The batch of a step. All steps together go through one random order of all sequences after another."""
        rows = [self._row(i) for i in range(step * self.size, (step + 1) * self.size)]
        return self._batch(rows, rows[self.group :: self.groups])

    def spread(self, count: int, all_groups: bool = False) -> list[Batch]:
        """Batches of up to `count` sequences, evenly spread over the text; with all_groups those of every group."""
        count = max(1, min(count, len(self.rows)) // self.groups) * self.groups
        rows = [self.rows[i * len(self.rows) // count] for i in range(count)]
        steps = [rows[first : first + self.size] for first in range(0, count, self.size)]
        return [self._batch(step, step if all_groups else step[self.group :: self.groups]) for step in steps]

    def _row(self, i: int) -> Row:
        epoch, place = divmod(i, len(self.rows))
        if epoch != self._epoch:
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.rows))
            self._epoch, self._order = epoch, order
        return self.rows[self._order[place]]

    def _batch(self, step: list[Row], rows: list[Row]) -> Batch:
        """Packed rows become one sequence: the borders between them are borders of documents like others."""
        pieces = [self.text[start : start + length + 1] for row in rows for start, length in row]
        tokens, labels = [piece[:-1] for piece in pieces], [piece[1:] for piece in pieces]
        cu_seqlens = np.cumsum([0] + [len(piece) for piece in tokens]).tolist() if self.packing else None
        join = _one_row if self.packing else np.stack
        return Batch(_int64(join(tokens)), _int64(join(labels)), cu_seqlens, sum(n for row in step for _, n in row))


def _windows(documents: Documents, seqlen: int) -> list[Row]:
    return [[(start, seqlen)] for start in range(0, len(documents.text) - seqlen, seqlen)]


def _packed_rows(documents: Documents, seqlen: int, seed: int) -> list[Row]:
    """Each piece, in random order, goes into the fullest of the open rows that have room for it."""
    borders = documents.starts.tolist()
    pieces = [
        (start, min(seqlen, end - 1 - start))
        for begin, end in zip(borders[:-1], borders[1:])
        for start in range(begin, end - 1, seqlen)
    ]
    full: list[Row] = []
    rows: list[tuple[int, Row]] = []  # room left, pieces
    for i in np.random.default_rng(seed).permutation(len(pieces)):
        length = pieces[i][1]
        rows.sort(key=lambda row: row[0])
        place = next((place for place, (room, _) in enumerate(rows) if room >= length), None)
        room, row = (seqlen, []) if place is None else rows.pop(place)
        rows.append((room - length, [*row, pieces[i]]))
        if len(rows) > OPEN_ROWS:
            full.append(min(rows)[1])
            rows.remove(min(rows))
    return full + [row for _, row in rows]


def _one_row(pieces: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(pieces)[None]


def _int64(tokens: np.ndarray) -> Tensor:
    return torch.from_numpy(tokens.astype(np.int64))


def bigram_loss(training: Documents, batches: list[Batch]) -> float:
    """Nats a byte on the batches of a table of byte pairs, counted in the training text and one added to each."""
    text = training.text.astype(np.int64)
    counts = np.bincount(text[:-1] * 256 + text[1:], minlength=256 * 256).reshape(256, 256) + 1
    nats = -np.log(counts / counts.sum(axis=1, keepdims=True))
    scores = [nats[batch.tokens.numpy(), batch.labels.numpy()].ravel() for batch in batches]
    return float(np.concatenate(scores).mean())
