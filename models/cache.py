"""Prompt embeddings are computed once: a bounded least-recently-used cache in CPU memory, optionally kept on disk."""

import hashlib
import os
from collections import OrderedDict

import torch
from safetensors.torch import load_file, save_file


class EmbeddingCache:
    """Least-recently-used cache from prompt to its embedding rows.

    encode_rows: function from a list of prompts to a dict of row-indexable tensors; called for the missing prompts
    only. max_prompts: how many prompts stay in memory (a FLUX prompt is 4 MB, so 512 are 2 GB); the least recently used
    goes first. folder: if given, every row is also kept there as <sha256 of the prompt>.safetensors and survives the
    run. The folder belongs to one model; the caller names it so.
    """

    def __init__(self, encode_rows, max_prompts=512, folder=None):
        self.encode_rows, self.max_prompts, self.folder = encode_rows, max_prompts, folder
        self.rows = OrderedDict()
        if folder:
            os.makedirs(folder, exist_ok=True)

    def __call__(self, prompts, batch_size=16):
        """The rows of `prompts`, stacked: dict name -> CPU tensor [len(prompts), ...]."""
        found = {}
        missing = []
        for prompt in dict.fromkeys(prompts):
            row = self.rows.get(prompt) or self._from_disk(prompt)
            if row is None:
                missing.append(prompt)
            else:
                found[prompt] = row
        for start in range(0, len(missing), batch_size):
            chunk = missing[start : start + batch_size]
            encoded = {name: tensor.cpu() for name, tensor in self.encode_rows(chunk).items()}
            for i, prompt in enumerate(chunk):
                found[prompt] = {name: tensor[i].clone() for name, tensor in encoded.items()}
                self._to_disk(prompt, found[prompt])
        for prompt, row in found.items():
            self.rows[prompt] = row
            self.rows.move_to_end(prompt)
        while len(self.rows) > self.max_prompts:
            self.rows.popitem(last=False)
        return {name: torch.stack([found[prompt][name] for prompt in prompts]) for name in found[prompts[0]]}

    def _path(self, prompt):
        return os.path.join(self.folder, hashlib.sha256(prompt.encode()).hexdigest() + ".safetensors")

    def _from_disk(self, prompt):
        return load_file(self._path(prompt)) if self.folder and os.path.exists(self._path(prompt)) else None

    def _to_disk(self, prompt, row):
        if self.folder:
            # Ranks share the folder: each writes its own file and renames it, so that nobody reads half a row.
            temporary = f"{self._path(prompt)}.{os.getpid()}"
            save_file(row, temporary)
            os.replace(temporary, self._path(prompt))
