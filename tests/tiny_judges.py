"""Judges of the known architectures, small and random, that answer where the real ones do. No network."""

from __future__ import annotations

from pathlib import Path

from convert.teachers.formats import GuardFormat, load_formats

# The architecture that each known judge has; Granite Guardian's and WildGuard's are a Granite and a Mistral.
ARCHITECTURES = {
    "llama-guard-3-8b": "llama",
    "llama-guard-3-1b": "llama",
    "shieldgemma": "gemma2",
    "qwen3guard-gen": "qwen3",
    "granite-guardian-3": "granite",
    "wildguard": "mistral",
}
LOUD = 3.6


def verdicts(form: GuardFormat) -> list[tuple[str, str]]:
    """What a judge may say, as (what stands before, answer)."""
    last = [steps[-1] for steps in form.steps.values()]
    return [(step.ask, answer) for step in last for answer in (*step.safe, *step.unsafe)]


def write_tokenizer(folder: Path, form: GuardFormat) -> None:
    """A byte-level tokenizer that has the judge's control tokens, and a word each for its answers."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    # As in Llama 3: a number of up to three digits is one token.
    words = Regex(r"\p{N}{1,3}| ?[^\s\p{N}]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    steps = [step for steps in form.steps.values() for step in steps]
    said = [step.ask + answer for step in steps for answer in (*step.choices, *step.safe, *step.unsafe)]
    said += [form.hazard_ask + answer for answer in form.hazard_answers]
    tokenizer.train_from_iterator([*said * 50, form.template], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in form.control])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=form.control[0]).save_pretrained(folder)


def write_judge(folder: Path, name: str, *, says: list[tuple[str, str]] | None = None) -> Path:
    """A random model of the judge's architecture whose every next token is one that ``says`` begins with.

    One channel of the hidden state is the same for every token and no layer writes to it; the output layer reads those
    tokens from it. The rest of their rows is random, so that the verdict depends on the text.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    form = load_formats()[name]
    write_tokenizer(folder, form)
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
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter[0] = 0
        model.model.embed_tokens.weight.mul_(20)
        model.model.embed_tokens.weight[:, 0] = 5
        model.lm_head.weight.mul_(10)
        for before, answer in says or verdicts(form):
            asked = tokenizer(before).input_ids if before else []
            model.lm_head.weight[tokenizer(before + answer).input_ids[len(asked)], 0] = LOUD
    model.save_pretrained(folder)
    return folder
