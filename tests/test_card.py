import contextlib
import dataclasses
import hashlib
import importlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from base64 import b64decode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file

import infer
import models
from models import card, checkpoint, parallel, run_folder
from models import pipeline as common

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
SCRIPTS = ["flow_grpo", "dance_grpo", "rloo", "remax", "pretrain", "grpo_unified"]
NASTY = "a | b\n# c <b>d</b> `e` ``` *f* [g](h) _i_ \\ & ~~j~~ $k$ ![l](m) \"n\" 'o': {p} @q é"


def make_run(folder, script, args, rows=((0, 0.25), (2, 0.5))):
    """A run folder as the scripts write one, but for checkpoints and samples."""
    run_folder.create(str(folder), args, str(ROOT / f"{script}.py"))
    for iteration, reward in rows:
        run_folder.append(str(folder), {"iteration": iteration, "eval_reward": reward, "eval_strict": reward / 2})
    run_folder.curves(str(folder), ["eval_reward"])
    return str(folder)


def recipe(script):
    return importlib.import_module(script).recipe


def arguments(script, *names, **changes):
    return dataclasses.replace(recipe(script)(*names), num_iterations=2, **changes)


def export(model, run, part="model", scale=0.05):
    """Move what is trained, save it with its card, and return the tensors."""
    torch.manual_seed(0)
    for p in parallel.trained(model.parts).values():
        p.data += scale * torch.randn_like(p)
    tensors = checkpoint.full_tensors(parallel.trained(model.parts))
    folder = os.path.join(run, part)
    model.save(folder, tensors)
    return folder, {name: t for name, t in tensors.items()}


def snippet(folder, monkeypatch):
    """Run the Python of a card where it says: in the folder, with a picture there. Returns its names and its output."""
    (source,) = re.findall(r"^```python\n(.*?)^```$", Path(folder, "README.md").read_text(), re.DOTALL | re.MULTILINE)
    lines = re.sub(r'"[^"]*/assets/', '"assets/', source).splitlines()  # the way to this checkout may be long
    assert all(len(line) <= 120 or line.startswith("messages = ") for line in lines)
    monkeypatch.chdir(folder)
    Image.new("RGB", (32, 32), "red").save("picture.png")
    names, out = {}, io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(source, "README.md", "exec"), names)
    monkeypatch.chdir(ROOT)
    os.remove(os.path.join(folder, "picture.png"))
    return names, out.getvalue()


# ----------------------------------------------------------------------------------------------------------------------
# Text


def test_what_users_chose_is_shown_and_is_no_markup():
    markdown = pytest.importorskip("markdown_it").MarkdownIt("gfm-like", {"linkify": False, "html": True})
    table = card._table(["", card.text(NASTY)], [[card.code(NASTY), "end"], ["x", card.text("_a_b_")]])
    tokens = markdown.parse(f"{table}\n\n# {card.text(NASTY)}\n\n{card.text(NASTY)}\n")
    kinds = [token.type for token in tokens]
    assert kinds.count("td_open") == 4 and kinds.count("th_open") == 2 and kinds.count("heading_open") == 1
    shown = [
        "".join(child.content for child in token.children if child.type != "html_inline")
        for token in tokens
        if token.type == "inline"
    ]
    line = " ".join(NASTY.split())
    assert shown == ["", line, line, "end", "x", "_a_b_", line, line]
    html = [c.content for token in tokens for c in token.children or [] if c.type == "html_inline"]
    assert html == ["<code>", "</code>"]

    for content in ("a\n```\nb", "````", "`", ""):
        (token,) = markdown.parse(card.fenced(content, "bash"))
        assert token.type == "fence" and token.content == content + "\n"


@pytest.mark.parametrize("script, names, changes", [
    ("flow_grpo", ("tiny-flux",), {}),
    ("flow_grpo", ("flux",), dict(reward=("pickscore:0.7", "http://host:80/ocr:0.3"), seed=7, window_range=(1, 4))),
    ("flow_grpo", ("sd3.5",), dict(sigma_schedule="single", shared_noise=True, checkpoint_activations=False)),
    ("dance_grpo", ("flux",), {}),
    ("dance_grpo", ("flux", "0"), dict(num_steps=12)),
    ("dance_grpo", ("klein", "4"), dict(lora_rank=4, prompts="a b/'c'.txt")),
    ("rloo", ("tiny-qwen",), dict(instruction='-say "so":\n$HOME `x` \\boxed{} \u00e9', overlong_buffer=2)),
    ("remax", ("qwen2.5-3b",), dict(instruction="", learning_rate=1e-7)),
    ("pretrain", ("tiny-blip3o-start",), dict(train_lm=True, train_dm=False, reward="", edit_data="")),
    ("pretrain", ("kontext",), dict(data="a.tar", lora_rank=8)),
    ("grpo_unified", ("tiny-flux", ""), {}),
    ("grpo_unified", ("flux", "tiny-qwen-refine", "text"), dict(num_updates=2)),
    ("grpo_unified", ("tiny-blip3o", "", "i2i"), dict(refine=True, train="joint")),
])  # fmt: skip
def test_command_line_gives_the_arguments_of_the_run(script, names, changes):
    module = importlib.import_module(script)
    args = dataclasses.replace(module.recipe(*names), out="outputs/x", **changes)
    saved = json.loads(json.dumps(dataclasses.asdict(args)))
    for known in (module.recipe, None):
        line = card.command(saved, f"{script}.py", known)
        # The shell's own reading of it
        words = subprocess.run(
            ["bash", "-c", f'python() {{ printf "%s\\0" "$@"; }}\n{line}'], capture_output=True, text=True, check=True
        ).stdout.split("\0")[:-1]
        assert words.pop(0) == f"{script}.py"
        selects = {flag: run_folder.peek(words, flag, "") for flag in ("--model", "--lm", "--task", "--lora-rank")}
        if script == "grpo_unified":
            defaults = module.recipe(selects["--model"] or "tiny-flux", selects["--lm"], selects["--task"])
        elif script == "dance_grpo":
            defaults = module.recipe(selects["--model"], selects["--lora-rank"])
        else:
            defaults = module.recipe(selects["--model"] or selects["--lm"])
        parsed = run_folder.command_line(defaults, [*words, "--out", "outputs/x"], f"{script}.py")
        assert parsed == args
        flags = [word for word in words if word.startswith("--") and word[2:3].isalpha()]
        chosen = {name for name in ("model", "lm") if saved.get(name)}
        if known:
            assert len(flags) <= len(changes) + len(chosen) + (names == ("flux", "0")) + len(names[2:])
        else:
            assert len(flags) > 30


def test_command_line_names_processes_and_no_password():
    line = card.command({"judge_url": "http://me:secret@host:80/v1"}, "a.py", None, 8)
    assert line == "torchrun --nproc_per_node 8 a.py --judge-url http://host:80/v1"
    assert card.command({"a": 1}, "a.py", None, 64).startswith("torchrun --nnodes 8 --nproc_per_node 8 a.py")


# ----------------------------------------------------------------------------------------------------------------------
# Cards and what they load


FLOW = [
    ("tiny-flux", 0, "FluxPipeline"),
    ("tiny-flux", 4, "FluxPipeline"),
    ("tiny-kontext", 4, "FluxKontextPipeline"),
    ("tiny-klein", 4, "Flux2KleinPipeline"),
    ("tiny-sd3", 0, "StableDiffusion3Pipeline"),
    ("tiny-sana", 4, "SanaPipeline"),
]


@pytest.mark.parametrize("name, rank, pipeline", FLOW)
def test_snippet_draws_with_the_exported_weights(name, rank, pipeline, tmp_path, monkeypatch):
    size = 64 if name == "tiny-klein" else 32  # the stock pipeline of klein takes no smaller picture
    run = make_run(tmp_path, "flow_grpo", arguments("flow_grpo", name, lora_rank=rank, resolution=size))
    model = models.load(name, CPU, torch.float32, lora_rank=rank, lora_alpha=2 * rank)
    folder, tensors = export(model, run)
    card.write(folder, run, recipe("flow_grpo"))
    names, _ = snippet(folder, monkeypatch)
    assert type(names["pipeline"]).__name__ == pipeline and names["picture"].size == (size, size)
    assert Image.open(os.path.join(folder, "out.png")).size == (size, size)
    loaded = {k.replace(".default_0.", ".default."): t for k, t in names["pipeline"].transformer.state_dict().items()}
    assert tensors.keys() and all(torch.equal(loaded[k.removeprefix("transformer.")], t) for k, t in tensors.items())
    if rank:
        layer = next(m for m in names["pipeline"].transformer.modules() if getattr(m, "scaling", None))
        assert list(layer.scaling.values()) == [2.0]

    data = ModelCard.load(os.path.join(folder, "README.md")).data.to_dict()
    edits = name in ("tiny-kontext", "tiny-klein")
    assert data == {
        "library_name": "diffusers",
        "pipeline_tag": "image-to-image" if edits else "text-to-image",
        "tags": ["reinforcement-learning", *(["lora"] if rank else [])],
        "license": "apache-2.0",
    }


@pytest.mark.parametrize("name, rank", [("tiny-qwen", 0), ("tiny-qwen", 4), ("tiny-qwen-vl", 0), ("tiny-qwen-vl", 4)])
def test_snippet_writes_what_the_exported_model_writes(name, rank, tmp_path, monkeypatch):
    run = make_run(tmp_path, "rloo", arguments("rloo", name, lora_rank=rank, max_new_tokens=6))
    lm = models.load_lm(name, CPU, torch.float32, lora_rank=rank, lora_alpha=2 * rank)
    picture = [Image.new("RGB", (32, 32), "red")] if name == "tiny-qwen-vl" else None
    question = "what colour is the circle?" if picture else "27+45="

    def write():
        out = lm.generate(lm.encode([question], 6, picture), 6, torch.zeros(1), torch.ones(1, dtype=torch.int64))
        return lm.decode(out["ids"], out["mask"])[0]

    before = write()
    folder, _ = export(lm, run, scale=0.3)
    assert write() != before
    card.write(folder, run, recipe("rloo"))
    _, out = snippet(folder, monkeypatch)
    assert out == write() + "\n"
    data = ModelCard.load(os.path.join(folder, "README.md")).data.to_dict()
    assert data["library_name"] == ("peft" if rank else "transformers")
    assert data["pipeline_tag"] == ("image-text-to-text" if picture else "text-generation")


def test_card_says_how_it_was_made_and_what_was_measured(tmp_path):
    args = arguments("flow_grpo", "tiny-flux", reward=("shapes:0.7", "jpeg:-0.1"), prompts=NASTY, kl_coef=0.01, seed=5)
    run = make_run(tmp_path, "flow_grpo", args, ((0, 0.123456), (1, 0.9), (2, 0.2)))
    folder, _ = export(models.load("tiny-flux", CPU, torch.float32), run)
    card.write(folder, run, recipe("flow_grpo"))
    text = Path(folder, "README.md").read_text()
    assert "| <code>eval_reward</code> | 0.1235 | 0.2 |\n" in text and "iteration 0 | iteration 2 |" in text
    assert "0.9 " not in text  # the best in between is nobody's start or end
    assert "<code>shapes:0.7</code>, <code>jpeg:-0.1</code>" in text and "| seed | <code>5</code> |" in text
    assert "Flow-GRPO: online RL for flow-matching models, https://arxiv.org/abs/2505.05470" in text
    assert "--seed 5" in text and "--kl-coef 0.01" in text and "--noise-level" not in text
    assert Path(folder, "curves.png").read_bytes() == Path(run, "curves.png").read_bytes() and "](curves.png)" in text
    assert "https://" in text and str(tmp_path) not in text
    # Written once more without the recipe, the short command line stays.
    card.write(folder, run)
    assert Path(folder, "README.md").read_text() == text
    os.remove(os.path.join(folder, "README.md"))
    card.write(folder, run)
    assert len(Path(folder, "README.md").read_text()) > len(text) + 500

    Path(run, "metrics.jsonl").write_text('{"iteration": 2, "eval_reward": null, "eval_strict": 0.5}\n')
    card.write(folder, run)
    text = Path(folder, "README.md").read_text()
    assert "| <code>eval_reward</code> | not measured |" in text and "one evaluation only" in text
    os.remove(os.path.join(run, "metrics.jsonl"))
    card.write(folder, run)
    assert "Nothing was evaluated" in Path(folder, "README.md").read_text()


BASES = [
    ("flux", "black-forest-labs/FLUX.1-dev", "other", "flux-1-dev-non-commercial-license"),
    ("kontext", "black-forest-labs/FLUX.1-Kontext-dev", "other", "flux-1-dev-non-commercial-license"),
    ("klein", "black-forest-labs/FLUX.2-klein-base-4B", "apache-2.0", None),
    ("sd3.5", "stabilityai/stable-diffusion-3.5-medium", "other", "stabilityai-ai-community"),
    ("sana", "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers", "other", "nscl-v2-custom"),
    ("qwen2.5-3b", "Qwen/Qwen2.5-3B-Instruct", "other", "qwen-research"),
    ("qwen2.5-7b", "Qwen/Qwen2.5-7B-Instruct", "apache-2.0", None),
    ("qwen2.5-vl-3b", "Qwen/Qwen2.5-VL-3B-Instruct", "other", "qwen-research"),
    ("qwen3-4b", "Qwen/Qwen3-4B", "apache-2.0", None),
    ("somebody/model", "somebody/model", "other", None),
]


@pytest.mark.parametrize("name, source, licence, licence_name", BASES)
def test_licence_is_that_of_the_base_model(name, source, licence, licence_name):
    (found,) = card._sources(name, name in models.LM_ALIASES)
    entries, note = card._licence([found])
    assert found == source and entries["license"] == licence and entries.get("license_name") == licence_name
    assert source in note or card.text(source) in note
    assert (licence_name is None) == ("license_link" not in entries)
    assert set(card.LICENCES) == {
        s for s in [*models.ALIASES.values(), *models.LM_ALIASES.values()] if s.count("/") == 1
    }


def test_base_model_is_named_where_others_can_find_it(tmp_path):
    args = arguments("flow_grpo", "flux", dtype="bf16")
    run = make_run(tmp_path / "run", "flow_grpo", args)
    model = models.load("tiny-flux", CPU, torch.float32, lora_rank=4, lora_alpha=8)
    folder, _ = export(model, run)
    with pytest.raises(RuntimeError, match="FLUX.1-dev"):  # whose class only the hub knows, and there is no network
        card.write(folder, run, recipe("flow_grpo"))
    shared = tmp_path / "shared"
    model = models.load("tiny-flux", CPU, torch.float32)
    model.save(str(shared), checkpoint.full_tensors(parallel.trained(model.parts)))
    run = make_run(tmp_path / "own", "flow_grpo", dataclasses.replace(args, model=str(shared)))
    folder, _ = export(models.load(str(shared), CPU, torch.float32, lora_rank=4, lora_alpha=8), run)
    card.write(folder, run, recipe("flow_grpo"))
    found = ModelCard.load(os.path.join(folder, "README.md"))
    assert "base_model" not in found.data.to_dict() and found.data.license == "other"
    assert "is a folder, not on the hub" in found.text and "torch.bfloat16" in found.text


def test_unified_model_names_both_of_its_parts(tmp_path):
    base, run = tmp_path / "base", make_run(tmp_path / "run", "pretrain", arguments("pretrain", "tiny-blip3o"))
    base.mkdir()
    config = dict(models.unified("tiny-blip3o"), lm="qwen2.5-vl-3b", sana="Efficient-Large-Model/Sana_1600M")
    (base / "config.json").write_text(json.dumps(config))
    saved = json.loads(Path(run, "args.json").read_text()) | dict(model=str(base))
    Path(run, "args.json").write_text(json.dumps(saved))
    folder = Path(run, "model")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dict(model_type="blip3o", base=str(base), lora_rank=4)))
    card.write(str(folder), run, recipe("pretrain"))
    found = ModelCard.load(folder / "README.md")
    assert found.data.base_model == ["Qwen/Qwen2.5-VL-3B-Instruct", "Efficient-Large-Model/Sana_1600M"]
    assert found.data.base_model_relation == "adapter" and found.data.license == "other"
    assert "library_name" not in found.data.to_dict() and "infer.py --mode t2i --model FOLDER" in found.text
    # The line gives a copy of the folder the settings of the run.
    (line,) = re.findall(r"^python infer.py (.*)$", found.text, re.MULTILINE)
    parsed = run_folder.parse(infer.Args(), shlex.split(line), "infer.py")
    told = [parsed.resolution, parsed.num_steps, parsed.guidance, parsed.image_guidance]
    assert told == [saved[name] for name in ("resolution", "num_steps", "guidance", "image_guidance")]
    for changes, mode, which in (
        (
            dict(task="i2i_cycle", refine=True, prompts="shapes-edit"),
            "i2i --refine --image",
            "what it holds out itself,",
        ),
        (dict(task="t2icot", prompts="a.txt"), "t2icot --model", "a tenth of the training prompts, chosen by hash,"),
    ):
        run_args = saved | dict(num_prompts=4, group_size=4, eval_prompts="", edit_data="x", **changes)
        Path(run, "args.json").write_text(json.dumps(run_args))
        card.write(str(folder), run, None)
        found = ModelCard.load(folder / "README.md").text
        assert f"infer.py --mode {mode}" in found and f"{which} and never trained on" in found
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="no export there"):
        card.write(str(folder), run)
    with pytest.raises(ValueError, match="no args.json"):
        card.write(str(folder), str(tmp_path))


def test_both_sides_of_a_joint_run_have_a_card_each(tmp_path, monkeypatch):
    import grpo_unified

    args = dataclasses.replace(
        grpo_unified.recipe("tiny-flux", ""), out=str(tmp_path), num_iterations=1, num_prompts=1, group_size=2,
        max_new_tokens=8, num_steps=2, eval_num_steps=2, eval_size=4, window_range=(0, 1), window_size=1, lora_rank=4,
        micro_batch_size=1, lm_micro_batch_size=1,
    )  # fmt: skip
    grpo_unified.main(args)
    lm, dm = (ModelCard.load(tmp_path / part / "README.md") for part in ("lm", "model"))
    assert (lm.data.library_name, dm.data.library_name) == ("peft", "diffusers")
    assert (lm.data.pipeline_tag, dm.data.pipeline_tag) == ("text-generation", "text-to-image")
    for found in (lm, dm):
        assert "--mode t2icot --model FOLDER" in found.text and "| iterations | 1 |" in found.text
        assert "iteration 0 | iteration 1 |" in found.text
    assert "Rewrite the following prompt" in lm.text and "learning rate 0.0001" in lm.text
    assert f"learning rate {args.learning_rate}" in dm.text
    names, _ = snippet(tmp_path / "lm", monkeypatch)
    assert type(names["lm"]).__name__.startswith("PeftModel")
    assert not [p for part in ("lm", "model") for p in card.files(tmp_path / part) if p.startswith(".")]


# ----------------------------------------------------------------------------------------------------------------------
# Large models


def test_large_export_is_cut_into_files_that_the_stock_loaders_read(tmp_path, monkeypatch):
    from diffusers import FluxPipeline
    from transformers import AutoModelForCausalLM

    whole = {}
    for name, load in (("tiny-flux", models.load), ("tiny-qwen", models.load_lm)):
        whole[name], _ = export(load(name, CPU, torch.float32), str(tmp_path), f"whole-{name}")
    monkeypatch.setattr(common, "MAX_SHARD_SIZE", "1MB")
    flux, tensors = export(models.load("tiny-flux", CPU, torch.float32), str(tmp_path), "flux")
    qwen, lm_tensors = export(models.load_lm("tiny-qwen", CPU, torch.float32), str(tmp_path), "qwen")
    shards = list(Path(flux, "transformer").glob("diffusion_pytorch_model-0*.safetensors"))
    lm_shards = list(Path(qwen).glob("model-0*.safetensors"))
    for found, index in (
        (shards, Path(flux, "transformer/diffusion_pytorch_model.safetensors.index.json")),
        (lm_shards, Path(qwen, "model.safetensors.index.json")),
    ):
        assert len(found) > 2 and max(path.stat().st_size for path in found) < 1.1e6
        assert set(json.loads(index.read_text())["weight_map"].values()) == {path.name for path in found}
    assert not list(Path(whole["tiny-flux"]).rglob("*.index.json")) + list(Path(whole["tiny-qwen"]).glob("*index*"))

    stock = FluxPipeline.from_pretrained(flux).transformer.state_dict()
    assert stock.keys() == load_file(f"{whole['tiny-flux']}/transformer/diffusion_pytorch_model.safetensors").keys()
    assert all(torch.equal(stock[name.removeprefix("transformer.")], t) for name, t in tensors.items())
    stock = AutoModelForCausalLM.from_pretrained(qwen).state_dict()
    assert all(torch.equal(stock[name.removeprefix("lm.")], t) for name, t in lm_tensors.items())
    again = parallel.trained(models.load(flux, CPU, torch.float32).parts)
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], t) for name, t in tensors.items())
    again = parallel.trained(models.load_lm(qwen, CPU, torch.float32).parts)
    assert again.keys() == lm_tensors.keys() and all(torch.equal(again[name], t) for name, t in lm_tensors.items())


# ----------------------------------------------------------------------------------------------------------------------
# Upload


@pytest.fixture
def upload(tmp_path):
    """A folder with one file of each kind; a safetensors file must be one."""
    folder = tmp_path / "upload"
    (folder / "tokenizer").mkdir(parents=True)
    card_text = '---\nlicense: apache-2.0\n---\n\n```python\nmodel = "."  # this folder\nother = "."\n```\n'
    (folder / "README.md").write_text(card_text)
    (folder / "config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ x }}")
    (folder / "tokenizer" / "spiece.model").write_bytes(b"\n\x0e")
    save_file({"a": torch.arange(4.0)}, folder / "model-00001-of-00001.safetensors")
    Image.new("RGB", (4, 4)).save(folder / "curves.png")
    return folder


NAMES = [
    "README.md", "chat_template.jinja", "config.json", "curves.png", "model-00001-of-00001.safetensors",
    "tokenizer/spiece.model",
]  # fmt: skip


def test_only_known_files_are_uploaded(upload):
    assert card.files(upload) == NAMES
    for name in ("optimizer.pt", "pytorch_model.bin", "tokenizer/run.py", ".token", "x.pkl", "weights.model"):
        (upload / name).write_bytes(b"x")
        with pytest.raises(ValueError, match=re.escape(f"{name}: only .safetensors, .json, .md, .png")):
            card.push(str(upload), "owner/name")
        (upload / name).unlink()
    (upload / "b.safetensors").write_bytes(b"\x80\x04K\x01." * 10)  # a pickle under another name
    with pytest.raises(ValueError, match="b.safetensors: damaged, or not in safetensors format"):
        card.files(upload)
    (upload / "b.safetensors").unlink()
    (upload / "b.json").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match="b.json: a link"):
        card.files(upload)
    (upload / "b.json").unlink()
    (upload / "README.md").unlink()
    with pytest.raises(ValueError, match="no README.md"):
        card.files(upload)


def test_upload_that_cannot_be_says_what_to_do(upload, monkeypatch):
    before = (upload / "README.md").read_bytes()
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    for name in ("owner/a--b", "owner/na me", "a/b/c", "owner/.name"):
        with pytest.raises(ValueError, match=f"--push {re.escape(name)}: "):
            card.push(str(upload), name)
    with pytest.raises(ValueError, match="--push name: expected owner/name"):
        card.push(str(upload), "name")
    with pytest.raises(RuntimeError, match="--push owner/name: the hub cannot be reached .*HF_HUB_OFFLINE"):
        card.push(str(upload), "owner/name")  # tests run with HF_HUB_OFFLINE=1
    assert (upload / "README.md").read_bytes() == before


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload asks for: the repository, which files go to its large storage, those, and the
    commit."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        hub, path = self.server, self.path
        hub.asked.append(path)
        if self.headers["Authorization"] != "Bearer hf_good":
            return self.reply({"error": "Invalid username or password."}, 401)
        if "stranger" in path or b'"stranger"' in body:
            return self.reply({"error": "You don't have the rights"}, 403)
        if path == "/api/repos/create":
            hub.created.append(json.loads(body))
            return self.reply({"url": f"{hub.url}/owner/name"})
        if path == "/api/validate-yaml":
            return self.reply({"errors": [], "warnings": []})
        if path == "/api/models/owner/name/preupload/main":
            large = (".safetensors", ".png")
            modes = [
                dict(path=f["path"], uploadMode="lfs" if f["path"].endswith(large) else "regular", shouldIgnore=False)
                for f in json.loads(body)["files"]
            ]
            return self.reply({"files": modes})
        if path == "/owner/name.git/info/lfs/objects/batch":
            objects = json.loads(body)["objects"]
            upload = [
                dict(oid=o["oid"], size=o["size"], actions={"upload": {"href": f"{hub.url}/lfs/{o['oid']}"}})
                for o in objects
            ]
            return self.reply({"transfer": "basic", "objects": upload})
        if path == "/api/models/owner/name/commit/main":
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[value["path"]] = b64decode(value["content"])
                if line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.large[value["oid"]]
            return self.reply({"commitUrl": f"{hub.url}/owner/name/commit/0", "commitOid": "0" * 40, "hookOutput": ""})
        self.reply({"error": f"unexpected {path}"}, 404)

    def do_PUT(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.large[hashlib.sha256(content).hexdigest()] = content
        self.reply({})

    def do_GET(self):
        self.server.asked.append(self.path)
        self.reply({"error": "Repository Not Found"}, 401)

    def reply(self, content, status=200):
        content = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


def test_upload_reaches_a_hub(upload):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.asked, server.created, server.files, server.large = [], [], {}, {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and k.lower() != "http_proxy"}
    environment |= dict(
        HF_ENDPOINT=server.url, HF_HUB_DISABLE_XET="1", HF_HOME=str(upload.parent), NO_PROXY="127.0.0.1",
        PYTHONPATH=str(ROOT), HF_HUB_DISABLE_PROGRESS_BARS="1",
    )  # fmt: skip
    program = (
        "import os, sys\nfrom models import card\n"
        "for token, name in (('', 'owner/name'), ('hf_bad', 'owner/name'), ('hf_good', 'stranger/name'),\n"
        "                    ('hf_good', 'owner/name')):\n"
        "    os.environ.update(HF_TOKEN=token)\n"
        "    try:\n"
        "        print(card.push(sys.argv[1], name, private=False))\n"
        "    except (RuntimeError, ValueError) as error:\n"
        "        print('error:', error)\n"
        "assert 'torch' not in sys.modules\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(upload)], env=environment, capture_output=True, text=True, timeout=60
    )
    server.shutdown()
    assert result.returncode == 0, result.stderr[-3000:]
    lines = result.stdout.splitlines()
    assert lines == [
        "error: --push owner/name: not logged in; run `hf auth login` with a token that may write",
        "error: --push owner/name: the hub does not accept the token; run `hf auth login` with one that may write",
        "error: --push stranger/name: the token may not write there; check the owner, or run `hf auth login` with "
        "another one",
        f"{server.url}/owner/name",
    ]
    (created,) = server.created
    assert (created["organization"], created["name"], created["visibility"]) == ("owner", "name", "public")
    assert sorted(server.files) == NAMES
    assert all(content == (upload / name).read_bytes() for name, content in server.files.items())
    text = server.files["README.md"].decode()
    assert 'model = "owner/name"  # this folder\nother = "."' in text
