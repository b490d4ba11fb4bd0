import os

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "agg",
}

import pytest
import torch

import lit_models._compat  # noqa: F401  (must run before transformers models are imported)

torch.set_num_threads(1)

TEXTS = [
    "Question: what is the best film of the year?\nAnswer: the one about a dog.",
    "A dull, slow and predictable story with a poor cast.",
    "A funny, warm and clever film; the actors are a joy to watch.",
    "The plot makes no sense, and the music is far too loud.",
]
VOCABULARY = 300


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Forget the seed of an earlier run, which Lightning keeps for the processes that later runs start."""
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory):
    """Folder with a byte-level BPE of 300 tokens: <pad> 0, <bos> 1, <eos> 2; it adds none of them by itself."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    model = ByteLevelBPETokenizer()
    model.train_from_iterator(
        TEXTS * 8, vocab_size=VOCABULARY, special_tokens=["<pad>", "<bos>", "<eos>"], show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model._tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    assert len(tokenizer) == VOCABULARY
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


def llama_config(**values):
    """Options of the Llama that all tests use."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **values,
    }


@pytest.fixture(scope="session")
def llama_options():
    """Function that gives the options of the tiny Llama, with changes."""
    return llama_config


def _save(model, tokenizer, folder):
    from transformers import AutoTokenizer

    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_lm(tiny_tokenizer, tmp_path_factory):
    """Folder with a Llama of two layers and its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**llama_config()))
    return _save(model, tiny_tokenizer, tmp_path_factory.mktemp("lm"))


@pytest.fixture(scope="session")
def tiny_reward(tiny_tokenizer, tmp_path_factory):
    """Folder with a one-label Llama, score statistics in its configuration, and its tokenizer."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = LlamaForSequenceClassification(LlamaConfig(**llama_config(), num_labels=1))
        torch.nn.init.normal_(model.score.weight, std=1.0)  # visible differences between texts
    model.config.reward_mean, model.config.reward_std = 0.5, 2.0
    return _save(model, tiny_tokenizer, tmp_path_factory.mktemp("reward"))


@pytest.fixture
def quiet_trainer(tmp_path):
    """Function that makes a CPU trainer without logger and progress bar."""
    from lightning.pytorch import Trainer

    def make(**options):
        defaults = {
            "accelerator": "cpu",
            "devices": 1,
            "default_root_dir": tmp_path,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        return Trainer(**(defaults | options))

    return make


@pytest.fixture
def free_port():
    """A TCP port nothing listens on."""
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
