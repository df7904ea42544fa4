"""Uploads to the Hugging Face Hub."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CARD = """---
library_name: diffusers
tags:
- unconditional-image-generation
- ddim_fast
---

```python
from ddim_fast import DDIMPipeline

images = DDIMPipeline.from_pretrained("{repo_id}")(batch_size=4).images
```
"""


def push_to_hub(
    obj_or_save_fn: Any,
    repo_id: str,
    *,
    private: bool | None = None,
    token: bool | str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    subfolder: str | None = None,
    **save_options: Any,
) -> str:
    """Save into a temporary folder and upload it as one commit; returns the commit's address.

    Args:
        obj_or_save_fn: something with `save_pretrained(folder, **save_options)`, or a function like it.
        repo_id: "namespace/name", or just "name" in the namespace of the token; created if need be.
        private, token, commit_message, create_pr, revision: as in `huggingface_hub` (`revision` is a branch).
        subfolder: upload into this folder of the repository.
        save_options: such as `variant="fp16"` or `max_shard_size="1GB"`.

    A repository without a README gets one that says how to load the model. Raises what `huggingface_hub` raises
    (no permission, no network), and nothing is uploaded if saving fails.
    """
    from huggingface_hub import HfApi

    save: Callable[..., Any] = getattr(obj_or_save_fn, "save_pretrained", obj_or_save_fn)
    if not callable(save):
        raise TypeError(f"push_to_hub needs an object with save_pretrained, got {type(obj_or_save_fn).__name__}")
    kind = type(obj_or_save_fn).__name__ if hasattr(obj_or_save_fn, "save_pretrained") else "model"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "upload"
        save(folder, **save_options)
        api = HfApi(token=token, library_name="ddim_fast")
        full_name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        is_pipeline = (folder / "model_index.json").is_file() and not subfolder
        if is_pipeline and not api.file_exists(full_name, "README.md", revision=revision):
            (folder / "README.md").write_text(_CARD.format(repo_id=full_name), encoding="utf-8")
        commit = api.upload_folder(
            repo_id=full_name,
            folder_path=folder,
            path_in_repo=subfolder,
            commit_message=commit_message or f"Upload {kind}",
            create_pr=create_pr,
            revision=revision,
        )
    return str(commit)
