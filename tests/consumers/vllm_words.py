"""Greedy answers of vLLM, in an environment that has it and not the trainer:

    build/vllm/bin/python tests/consumers/vllm_words.py ORDERS.json

ORDERS.json: {"images": [PNG files], "questions": [texts], "engines": [{"model": DIR, "connector":
bool, "adapters": {name: DIR or null}}, ...]}. The last line is JSON: {name: answers, image by
image}. One process and one thread of a CPU, fp32.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
TOKENS = 24
RANK = 16


def engine(order):
    from vllm import LLM

    adapted = any(order["adapters"].values())
    lora = {"enable_lora": True, "max_lora_rank": RANK} if adapted else {}
    if order["connector"]:
        lora["enable_tower_connector_lora"] = True
    return LLM(
        model=order["model"],
        dtype="float32",
        max_model_len=1024,
        max_num_seqs=2,
        enforce_eager=True,
        limit_mm_per_prompt={"image": 1, "video": 0},
        **lora,
    )


def answers(llm, directory, orders):
    from PIL import Image
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    sampling = SamplingParams(temperature=0.0, max_tokens=TOKENS)
    lora = directory and LoRARequest(directory, 1 + len(directory), directory)
    said = []
    for file in orders["images"]:
        for question in orders["questions"]:
            picture = {"image": Image.open(file).convert("RGB")}
            asked = {"prompt": prompt(llm, question), "multi_modal_data": picture}
            (found,) = llm.generate(asked, sampling, use_tqdm=False, lora_request=lora or None)
            said.append(found.outputs[0].text)
    return said


def prompt(llm, question):
    content = [{"type": "image"}, {"type": "text", "text": question}]
    chat = [{"role": "user", "content": content}]
    tokenizer = llm.get_tokenizer()
    return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


def main():
    orders = json.loads(Path(sys.argv[1]).read_text())
    said = {}
    for order in orders["engines"]:
        llm = engine(order)
        for name, directory in order["adapters"].items():
            said[name] = answers(llm, directory, orders)
        del llm
    print(json.dumps(said))


if __name__ == "__main__":
    main()
