"""Judges of the known architectures, small and random, that answer where the real ones do. No network."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.teachers.formats import GuardFormat, load_formats
from convert.teachers.judge import Judge

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from tokenizers import Tokenizer

# The architecture that each known judge has.
ARCHITECTURES = {
    "llama-guard-3-8b": "llama",
    "llama-guard-3-1b": "llama",
    "shieldgemma": "gemma2",
    "qwen3guard-gen": "qwen3",
    "granite-guardian-3": "granite",
    "wildguard": "mistral",
}
# As in the real tokenizers: recognised wherever they are spelled (Qwen3), or not there at all (WildGuard).
NOT_SPECIAL = ("<think>", "</think>")
ABSENT = ("<|user|>", "<|assistant|>")
# Llama 3's rule; a number of up to three digits is one token.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,DIGITS}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
LOUD, QUIET = 5.0, 3.5  # of the tokens that a verdict, and a hazard, begins with
# Attention that picks a few tokens, and counts for something beside the embedding.
SCALES = {"q_proj.": 25, "k_proj.": 25, "q_norm.": 3, "k_norm.": 3, "v_proj.": 10, "o_proj.": 10, "mlp.": 3}


@dataclass
class TinyJudges:
    """The judges below ``root``, each made when it is first asked for."""

    root: Path
    judges: dict[str, Judge] = field(default_factory=dict)

    def folder(self, name: str) -> Path:
        """Where the judge's model is."""
        path = self.root / name
        return path if path.exists() else write_judge(path, name)

    def judge(self, name: str) -> Judge:
        """The judge, loaded."""
        from convert.teachers.transformers_model import TransformersModel

        if name not in self.judges:
            self.judges[name] = Judge(TransformersModel(str(self.folder(name))), load_formats()[name])
        return self.judges[name]


def write_judge(folder: Path, name: str, *, says: list[tuple[str, str]] | None = None, digits: int = 3) -> Path:
    """A random model of the judge's architecture whose every next token is one that ``says`` begins with.

    ``says``: (what stands before, answer); None for the judge's verdicts. One channel of the hidden state is the same
    for every token and no layer writes to it; the output layer reads those tokens from it. The rest of their rows, and
    a sharp attention, is random, so that the verdict depends on the text.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    form = load_formats()[name]
    write_tokenizer(folder, form, ARCHITECTURES[name], digits)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = AutoConfig.for_model(
        ARCHITECTURES[name],
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=False,
        max_position_embeddings=4096,
        sliding_window=4096,
        query_pre_attn_scalar=16,
        attention_multiplier=0.25,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter_name, parameter in model.model.layers.named_parameters():
            parameter.mul_(next((factor for part, factor in SCALES.items() if part in parameter_name), 1))
            if parameter_name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter[0] = 0
        model.model.embed_tokens.weight.mul_(20)
        model.model.embed_tokens.weight[:, 0] = 8
        if config.model_type == "gemma2":  # which multiplies it by the root of the width
            model.model.embed_tokens.weight.div_(config.hidden_size**0.5)
        model.lm_head.weight.mul_(6)
        spoken = [(*pair, LOUD) for pair in says or _verdicts(form)]
        spoken += [(form.hazard_ask, answer, QUIET) for answer in form.hazard_answers if not says]
        for before, answer, volume in spoken:
            start, both = (tokenizer("\n\n" + text).input_ids for text in (before, before + answer))
            model.lm_head.weight[both[len(start)], 0] = volume
    model.save_pretrained(folder)
    return folder


def _verdicts(form: GuardFormat) -> list[tuple[str, str]]:
    last = [steps[-1] for steps in form.steps.values()]
    return [(step.ask, answer) for step in last for answer in (*step.safe, *step.unsafe)]


def write_tokenizer(folder: Path, form: GuardFormat, architecture: str, digits: int = 3) -> None:
    """A tokenizer of the architecture's kind with the judge's control tokens, and a token for every word it uses."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    steps = [step for steps in form.steps.values() for step in steps]
    said = [step.ask + answer for step in steps for answer in (*step.choices, *step.safe, *step.unsafe)]
    said += [form.hazard_ask + answer for answer in form.hazard_answers]
    texts = [form.template, *said * 50]
    if architecture in ("gemma2", "mistral"):
        tokenizer = _sentencepiece(texts, legacy=architecture == "mistral")
    else:
        tokenizer = _byte_level(texts, digits)
    tokens = [token for token in (*form.control, *form.markers) if token not in ABSENT]
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in tokens if t not in NOT_SPECIAL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in tokens if t in NOT_SPECIAL])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=tokens[0]).save_pretrained(folder)


def _byte_level(texts: list[str], digits: int) -> Tokenizer:
    """As Llama 3, Qwen3 and Granite have."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    words = pre_tokenizers.Split(Regex(WORDS.replace("DIGITS", str(digits))), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=4000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _sentencepiece(texts: list[str], *, legacy: bool) -> Tokenizer:
    """As Gemma and (``legacy``: a space before every piece of text) Mistral have: no words, bytes to fall back on."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁?[^▁\n]+|▁+|\n"), "isolated")
    trained.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=4000, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(model["vocab"], key=model["vocab"].get)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(merge) for merge in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps: list[Any] = [normalizers.Prepend("▁")] if legacy else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def write_gguf_judge(folder: Path, path: Path) -> Path:
    """The Llama judge in ``folder`` as a GGUF file for llama.cpp, in float32."""
    from gguf import GGUFWriter
    from transformers import AutoModelForCausalLM

    from edgeguard.engines.gguf_file import permuted_rows, tensor_names

    model = AutoModelForCausalLM.from_pretrained(folder)
    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, json.loads((folder / "tokenizer.json").read_text()))
    names = {**tensor_names(config.num_hidden_layers), "lm_head.weight": "output.weight"}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for hf_name, tensor in model.state_dict().items():
        array = permuted_rows(tensor.numpy(), heads.get(hf_name.split(".")[-2]))
        writer.add_tensor(names[hf_name], array.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: GGUFWriter, tokenizer: dict[str, Any]) -> None:
    """A byte-level BPE with Llama 3's words; the added tokens are control tokens."""
    added = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    by_id = {i: token for token, i in tokenizer["model"]["vocab"].items()} | added
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list([by_id[i] for i in range(len(by_id))])
    writer.add_token_types([3 if i in added else 1 for i in range(len(by_id))])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
