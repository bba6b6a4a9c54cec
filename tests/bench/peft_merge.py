"""What everyone does today, to compare with: load the model, wrap it, merge it, save it.

python -m tests.bench.peft_merge BASE ADAPTER OUT
"""

import shutil
import sys
from pathlib import Path


def main(base: str, adapter: str, out: str) -> None:
    import peft
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.save_pretrained(out)
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(out)
    # transformers 5 does not save it; llama.cpp's converter reads the vocabulary of it.
    shutil.copy(Path(base) / "tokenizer.model", out)


if __name__ == "__main__":
    main(*sys.argv[1:])
