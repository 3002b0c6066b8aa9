"""
vLLM as the sampler of a language model, behind the same `generate` as that of models/qwen.py. Optional: `pip install
"vllm>=0.32"`. Text only.

    sampler = vllm.load(model)                                      # model: a Qwen, sharded or not; all ranks together
    sampler.update(model)                                           # after optimizer steps; all ranks together
    out = sampler.generate(prompt_ids, max_new_tokens, temperature, seeds)

Every rank has an engine of its own, in its own process and on its own GPU, beside the policy that is trained there.
Engines know nothing of each other: a rank may generate more, or longer, than the next.

What vLLM computes is not bit for bit what the policy computes: other kernels and other batches (numbers for its CPU
build: benchmarks/RESULTS.md).
A script that trains on such samples weighs them with exp(logp of the policy - logp returned here).

Written for vLLM 0.32.0 and run with its CPU build on 1 and 2 ranks (tests/test_vllm.py); not run on a GPU yet. The CPU
build fails at batches of more than some thousand prompt tokens: it cuts prompts, and torch's generators on the CPU
cannot be wound back.
"""

import os

import torch
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence

TEMPERATURES = (0.01, 2.0)  # beside 0: vLLM silently raises what is below, and refuses what is above


def load(model, max_tokens=0, memory_fraction=0.4, eager=False):
    """An engine for `model`, a models.qwen.Qwen, as a `Sampler`. All ranks call it together.

    It starts with random weights: call `update` before `generate`. max_tokens: of a prompt and its completion together
    (0 = the model's context); fewer need less memory. memory_fraction: share of the whole GPU's memory that the engine
    takes for weights, keys and values, and keeps. eager: no CUDA graphs and no compilation, which start sooner.

    Raises RuntimeError where vLLM is missing, ValueError for a model that takes pictures and for max_tokens beyond the
    context; and what vLLM raises, e.g. where memory_fraction is not free or does not hold one row of max_tokens.
    """
    config = model.parts["lm"].config
    if hasattr(config, "vision_config"):
        raise ValueError(f"'{model.source}' takes pictures, --rollout vllm is for text; use --rollout transformers")
    if max_tokens > model.context:
        raise ValueError(f"max_tokens {max_tokens} is beyond the context of '{model.source}', {model.context} tokens")
    # Before the import. In this process, weights reach the engine as tensors; vLLM's own would be a process away.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        import vllm
    except ModuleNotFoundError as error:
        raise RuntimeError(f'--rollout vllm needs vLLM ({error}): pip install "vllm>=0.32"') from None
    max_tokens = max_tokens or model.context
    llm = vllm.LLM(
        model.source,
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype=model.dtype,
        # Logits in fp32: rounded to bf16 they would be off by up to 0.05 nats.
        hf_overrides={"head_dtype": "float32"},
        generation_config="vllm",  # no top-p, top-k or repetition penalty of the model's generation_config.json
        logprobs_mode="processed_logprobs",  # under softmax(z / T), not softmax(z)
        max_model_len=max_tokens,
        gpu_memory_utilization=memory_fraction,
        enforce_eager=eager,
        # Beside the ranks of torchrun, in the process group that exists, each as a tensor-parallel group of one.
        distributed_executor_backend="external_launcher" if "RANK" in os.environ else "uni",
    )
    return Sampler(llm, model, max_tokens)


class Sampler:
    """An engine with the `generate` of models.qwen.Qwen. `llm` is the vllm.LLM."""

    def __init__(self, llm, model, max_tokens):
        self.llm, self.max_tokens, self.updated = llm, max_tokens, False
        self.device, self.stop_ids = model.device, model.stop_ids
        self.pad_id = model.tokenizer.pad_token_id or 0

    @torch.no_grad()
    def update(self, model):
        """Give the engine the present weights of `model`, adapters merged, rounded to the compute dtype. All ranks call
        it together, while parameters are sharded.

        Gathers one tensor at a time; the engine collects those of a layer's one projection (query, key and value, say),
        then copies them into its own memory. A merged weight is rounded once more than the policy's, which adds the
        adapter's output to that of the rounded weight.
        """
        iterator = weights(model.parts["lm"], model.dtype)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iterator})
        if self.device.type == "cpu":
            self.llm.apply_model(_repack_head)
        self.llm.reset_prefix_cache()  # keys and values of the weights before
        self.updated = True

    def generate(self, prompt_ids, max_new_tokens, temperature, seeds):
        """Sample a completion of each prompt; for this rank alone.

        Arguments and result are those of models.qwen.Qwen.generate, on the same device. Tokens are drawn from
        softmax(z / T) with random numbers of vLLM's own: not the tokens that Qwen.generate draws with these seeds. The
        same seed draws the same token from the same logits, whose rounding depends on what else is in the batch.

        Raises ValueError for an empty prompt, one that does not fit, and a temperature that is neither 0 nor in
        TEMPERATURES; RuntimeError before the first `update`.
        """
        B = len(prompt_ids)
        if not self.updated:
            raise RuntimeError("the engine has random weights until the first update(model)")
        if not isinstance(temperature, torch.Tensor):
            temperature = torch.full((B,), float(temperature))
        temperatures = [round(t, 6) for t in temperature.tolist()]  # 0.01 in fp32 is less than 0.01
        low, high = TEMPERATURES
        if len(temperatures) != B or not all(t == 0 or low <= t <= high for t in temperatures):
            raise ValueError(f"temperature must be 0 or {low} to {high} with vLLM, a float or one for each of {B} rows")
        lengths = [len(ids) for ids in prompt_ids]
        if min(lengths, default=0) == 0 or max_new_tokens < 1:
            raise ValueError("generate needs prompts that are not empty and max_new_tokens >= 1")
        if max(lengths) + max_new_tokens > self.max_tokens:
            raise ValueError(
                f"a prompt of {max(lengths)} tokens and --max-new-tokens {max_new_tokens} do not fit into the "
                f"{self.max_tokens} tokens that the engine was made for"
            )
        if seeds.dtype != torch.int64 or seeds.shape != (B,):
            raise TypeError(f"seeds must be int64 [{B}], got {seeds.dtype} {list(seeds.shape)}")

        from vllm import SamplingParams

        params = [
            SamplingParams(
                temperature=t,
                seed=seed & (2**63 - 1),  # to vLLM -1 is no seed at all
                max_tokens=max_new_tokens,
                stop_token_ids=self.stop_ids,
                ignore_eos=True,  # the engine's own idea of an end: stop_ids has them all
                logprobs=0,  # of the sampled token, and of no others
                detokenize=False,
            )
            for t, seed in zip(temperatures, seeds.tolist())
        ]
        prompts = [{"prompt_token_ids": list(ids)} for ids in prompt_ids]
        outputs = [request.outputs[0] for request in self.llm.generate(prompts, params, use_tqdm=False)]
        ids = [list(output.token_ids) for output in outputs]
        logps = [
            [of_token[token].logprob for token, of_token in zip(output.token_ids, output.logprobs, strict=True)]
            for output in outputs
        ]
        return {name: tensor.to(self.device) for name, tensor in pack(ids, logps, self.stop_ids, self.pad_id).items()}


def pack(ids, logps, stop_ids, pad_id):
    """What Qwen.generate returns, as CPU tensors, of B lists of sampled tokens and B lists of their log-probs."""
    mask = pad_sequence([torch.ones(len(row), dtype=torch.int64) for row in ids], True)
    padded = pad_sequence([torch.tensor(row) for row in ids], True, pad_id)
    filled = pad_sequence([torch.tensor(row, dtype=torch.float32) for row in logps], True)
    truncated = torch.tensor([row[-1] not in stop_ids for row in ids])
    return {"ids": padded, "mask": mask, "truncated": truncated, "logps": filled}


@torch.no_grad()
def weights(lm, dtype):
    """Yields (name, full tensor) of a transformers model as its checkpoint has them: W + scale * B A where there is a
    PEFT adapter, a tied head under the embedding's name only. Floating point tensors are in dtype, on the device of
    their shard. Every rank must take as many."""
    for name, parameter in lm.named_parameters():
        owner, _, of_base = name.rpartition(".base_layer.")
        if ".lora_" in name:
            continue
        if of_base == "weight":
            layer = lm.get_submodule(owner)
            A, B = (_full(part["default"].weight) for part in (layer.lora_A, layer.lora_B))
            full = _full(parameter).float().addmm(B.float(), A.float(), alpha=layer.scaling["default"]).to(dtype)
        else:
            full = _full(parameter.to(dtype))  # cast before the gather: fewer bytes to send
        yield name.replace(".base_layer.", "."), full.detach()


def _full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _repack_head(engine_model):
    """The CPU's kernels multiply by a packed copy of the head, which reload_weights forgets where the head is tied."""
    head = engine_model.lm_head
    head.quant_method.process_weights_after_loading(head)
