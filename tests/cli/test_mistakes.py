"""What a new user gets wrong, and what the command line says: nothing is silent, nothing is a bare traceback.

Each row is a call and a part of its one line on stderr. `MISTAKES` are told before a model is loaded, `LOADED` with the
models at hand; `NOTED` run, with a note. `kit` is a recipe, `large-base`, `tiny-tuned` and `tiny-base` its members;
`t5`, `llava` and `vit` are other kinds of models, `copy`, `bare`, `half` and `reward` copies that lack something.
"""

from __future__ import annotations

import io
import json
import math
import re
import shlex
import shutil

import pytest
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertLMHeadModel, LlavaConfig, T5Config, ViTConfig

import proxytune
from proxytune.cli import main
from proxytune.demo.bundle import MEMBERS
from proxytune.recipe import ForkCalibration, write_fork_threshold

GENERATE = "generate --recipe kit"
SAMPLE = "sample --recipe kit --no-forks --max-new-tokens 2 --branches 2"
CALIBRATE = "calibrate --recipe kit"
USER = {"role": "user", "content": "Who?"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "find", "arguments": "{}"}}]}

# What a user of the command line cannot write: keywords and calls of Python.
PYTHON = re.compile(
    r"\b(members|tokenizers|end_tokens|check_vocabulary|self_test|is_decoder|trust_\w+|remove_\w+)=|from_pretrained|Decoding\(\w+="
)

FILES: dict[str, str | bytes] = {
    "prompts.txt": "Question: Who\n",
    "empty.txt": "",
    "tight.txt": 508 * "a " + "\n\n \n",
    "blank.txt": "a\n\nb\n",
    "latin.txt": "one\nGröße\n".encode("latin-1"),
    "wide.txt": "Größe\n".encode("utf-16"),
    "array.json": '[{"prompt": "a"}]',
    "table.csv": "id,prompt\n1,a\n",
    "packed.jsonl.gz": b"\x1f\x8b\x08",
    "cut.jsonl": '{"prompt": "a"}\n{"prompt": "b',
    "gap.jsonl": '{"prompt": "a"}\n\n{"prompt": "b"}\n',
    "list.jsonl": '["a", "b"]\n',
    "word.jsonl": "hello\n",
    "question.jsonl": '{"question": "Who?"}\n',
    "misspelt.jsonl": '{"promt": "a"}\n',
    "capital.jsonl": '{"Prompt": "a"}\n',
    "number.jsonl": '{"prompt": 3}\n',
    "null.jsonl": '{"prompt": null}\n',
    "turns.jsonl": json.dumps({"prompt": [USER]}),
    "twice.jsonl": '{"prompt": "a", "prompt": "b"}\n',
    "both.jsonl": json.dumps({"prompt": "a", "messages": [USER]}),
    "clash.jsonl": '{"prompt": "a", "completion": "b"}\n',
    "gold.jsonl": '{"prompt": "a", "answer": "b"}\n',
    "setting.jsonl": '{"prompt": "a", "temperature": 0.7}\n',
    "nan.jsonl": '{"prompt": "a", "score": NaN}\n',
    "long.jsonl": json.dumps({"prompt": "a"}) + 2 * ("\n" + json.dumps({"prompt": "a " * 600})),
    "half.jsonl": '{"prompt": "a\\ud83d"}\n',
    "answered.jsonl": json.dumps({"messages": [USER, {"role": "assistant", "content": "I."}]}),
    "sharegpt.jsonl": json.dumps({"messages": [{"from": "human", "value": "Who?"}]}),
    "conversations.jsonl": json.dumps({"conversations": [USER]}),
    "role.jsonl": json.dumps({"messages": [{"role": "usr", "content": "Who?"}]}),
    "parts.jsonl": json.dumps({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "a"}]}]}),
    "silent.jsonl": json.dumps({"messages": [{"role": "assistant", "content": None}, USER]}),
    "called.jsonl": json.dumps({"messages": [USER, CALL, USER]}),
    "nobody.jsonl": '{"messages": []}\n',
    "mixed.jsonl": json.dumps({"prompt": "a"}) + "\n" + json.dumps({"messages": [USER]}),
    "system.jsonl": '{"prompt": "a", "system": "Be brief."}\n',
    "own-system.jsonl": json.dumps({"messages": [{"role": "system", "content": "Be kind."}, USER]}),
    "system-prompt.jsonl": '{"prompt": "a", "system_prompt": "Be brief."}\n',
    "chat.jsonl": json.dumps({"messages": [USER]}),
    "lines.txt": '{"prompt": "Question: Who"}\n{"prompt": "x"}\n',
    "objects.txt": '{"question": "Who?"}\n',
    "foreign.txt": "my thesis\n",
    "broken/proxytune_config.json": '{"base": ',
    "model.gguf": b"GGUF",
    "packed/model.gguf": b"GGUF",
    "adapter/adapter_config.json": '{"peft_type": "LORA", "base_model_name_or_path": "tiny-base"}',
    "orphan/adapter_config.json": '{"peft_type": "LORA", "base_model_name_or_path": "./none"}',
    "own/config.json": '{"model_type": "own", "auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}',
    "own/modeling_own.py": "open('ran', 'w').close()\n",
    "odd/proxytune_config.json": '{"format_version": 1, "bsae": 1}',
}

MISTAKES = {
    # --- the call -----------------------------------------------------------------------------------------------------
    "a misspelt command": (
        "generat hello",
        "No such command 'generat'. Did you mean 'generate'? (see proxytune --help)",
    ),
    "a command of other programs": ("help", "No such command 'help'. (see proxytune --help)"),
    "a prompt instead of a command": ("'Who is there?'", "No such command 'Who is there?'."),
    "a command's option before it": ("--recipe kit generate hello", "No such option: --recipe"),
    "a misspelt option": (f"{GENERATE} hello --alhpa 1", "No such option: --alhpa"),
    "one hyphen": (f"{GENERATE} hello -alpha 1", "No such option: -a"),
    "a typographic dash": (f"{GENERATE} hello —alpha 1", "'—alpha': expected two hyphens, --; got U+2014, a dash"),
    "an option of another command": (f"{GENERATE} hello --branches 4", "No such option: --branches"),
    "an option without its value": (f"{GENERATE} hello --alpha", "Option '--alpha' requires an argument"),
    "an argument too many": ("demo large-base", "Got unexpected extra argument(s) (large-base)"),
    "a word for a number": (f"{GENERATE} hello --alpha strong", "'--alpha': Input should be a valid number"),
    "a decimal comma": (f"{GENERATE} hello --alpha 0,5", "unable to parse string as a number; got '0,5'"),
    "not a number": (f"{GENERATE} hello --alpha nan", "alpha: expected a finite number"),
    "nothing in a batch": (f"{GENERATE} hello --batch-size 0", "greater than or equal to 1; got '0'"),
    "a negative seed": (
        f"{GENERATE} hello --seed -1",
        "'--seed': Input should be greater than or equal to 0; got '-1'",
    ),
    # --- the models ---------------------------------------------------------------------------------------------------
    "no models": ("generate hello", "got no --base, --expert, --antiexpert. The shift is expert minus antiexpert"),
    "no antiexpert": ("generate hello --base large-base --expert tiny-tuned", "got no --antiexpert. The shift is"),
    "models and a recipe": (f"{GENERATE} hello --base large-base", "got --recipe and --base. Drop one."),
    "no such recipe": ("generate hello --recipe kti", "recipe: expected a proxytune_config.json; got no file at kti."),
    "a model as the recipe": ("generate hello --recipe large-base", "got no file at large-base/proxytune_config.json."),
    "prompts as the recipe": ("generate hello --recipe prompts.txt", "recipe prompts.txt: expected JSON; got"),
    "a recipe that breaks off": ("generate hello --recipe broken", "proxytune_config.json: expected JSON; got"),
    "a misspelt key in a recipe": ("generate hello --recipe odd", "unknown 'bsae'. Remove or correct them"),
    "an unknown device": (f"{GENERATE} hello --device gpu", "--device: expected 'auto'"),
    "a device that is not there": (f"{GENERATE} hello --device cuda:99", "--device: expected 'auto'"),
    "half of a dtype": (f"{GENERATE} hello --dtype bf16", "got 'bf16'. Did you mean 'bfloat16'?"),
    "an option at the end": (f"{GENERATE} hello --out", "Option '--out' requires an argument"),
    "an empty variable": (
        f"{GENERATE} hello --save-recipe ''",
        "--save-recipe: expected a name; got ''. Name it; or",
    ),
    "an empty variable for a model": (
        "calibrate a --base=",
        "--base: expected a name; got ''. Name it; or is a",
    ),
    "a config as the recipe": (
        "generate hello --recipe kit/config.json",
        "--recipe: expected the folder of a recipe, or the proxytune_config.json in it; got kit/config.json. Pass",
    ),
    "a model's config as the recipe": (
        "generate hello --recipe large-base/config.json",
        "got large-base/config.json. It is that of a plain model.",
    ),
    "a recipe without its option": ("generate kit hello", "antiexpert. Pass --recipe kit."),
    "a GPU for a torch without one": (
        f"{GENERATE} hello --device cuda",
        "got 'cuda'. This torch was built without CUDA: install another, or use one that is there.",
    ),
    "a member that moved": (
        "generate hello --recipe moved",
        "the expert: expected a hub id, or a folder with a config.json and weights; got './gone', where there is no "
        "folder. Correct the path. It is named in the recipe moved/proxytune_config.json: if the member was moved, wri",
    ),
    "the expert twice": (
        "generate hello --base large-base --expert tiny-tuned --antiexpert ./tiny-tuned",
        "tiny-tuned' for both: expert - antiexpert is 0, so only the base is left. Pass the model that the expert was "
        "tuned from. For the base alone, pass --alpha 0.",
    ),
    "a path that is not there": (
        "generate hello --base ./none --expert tiny-tuned --antiexpert tiny-base",
        "the base: expected a hub id, or a folder with a config.json and weights; got './none', where there is no",
    ),
    "a GGUF file": (
        "generate hello --base large-base --expert model.gguf --antiexpert tiny-base",
        "the expert: expected a hub id, or a folder with a config.json and weights; got the file 'model.gguf'. "
        'Name it in a recipe: "expert": {"id": "',
    ),
    "a folder of GGUF files": (
        "sample hello --no-forks --base large-base --expert packed --antiexpert tiny-base",
        'packed\', which has GGUF files only. Name it in a recipe: "expert": {"id": "',
    ),
    "a vision-language model": (
        "generate hello --base llava --expert tiny-tuned --antiexpert tiny-base",
        "llava', LlavaForConditionalGeneration (llava), which takes more than text. The command line opens causal LMs",
    ),
    "an encoder-decoder": ("calibrate a --base t5", "the base: expected a decoder-only model; got '"),
    "an encoder-decoder as the expert": (
        "generate hello --base large-base --expert t5 --antiexpert tiny-base",
        "t5', T5ForConditionalGeneration (t5), an encoder-decoder. Encoder-decoders are composed by proxytune.wrap,",
    ),
    "an encoder": (
        "generate hello --base large-base --expert tiny-tuned --antiexpert vit",
        "the antiexpert: expected a causal LM (AutoModelForCausalLM); got '",
    ),
    "an adapter without peft": (
        "generate hello --base large-base --expert adapter --antiexpert tiny-base",
        "adapter', a PEFT adapter (adapter_config.json), and no peft in this environment. Run pip install peft, or pas",
    ),
    "an adapter whose model moved": (
        "generate hello --base large-base --expert orphan --antiexpert tiny-base",
        "orphan', an adapter of './none', where there is no folder. Write where the model is now under \"base_model_na",
    ),
    "code of a member's own": (
        "generate hello --base large-base --expert own --antiexpert tiny-base",
        "own', which would run modeling_own.py of its own. Read that file first. If you trust it, pass --trust expert,",
    ),
    "trust in another member": (
        "sample hello --no-forks --base large-base --expert own --antiexpert tiny-base --trust base",
        "own', which would run modeling_own.py of its own. Read that file first. If you trust it, pass --trust expert,",
    ),
    "trust in a file": (
        f"{GENERATE} hello --trust modeling_own.py",
        "--trust: expected 'base', 'expert', 'antiexpert' or 'all'; got 'modeling_own.py'.",
    ),
    "unknown end tokens": (f"{GENERATE} hello --end-tokens both", "'both' is not one of 'union', 'base', 'expert'"),
    "end tokens twice": (
        f"{GENERATE} hello --end-tokens base eos_token_id=5",
        "--end-tokens: expected no eos_token_id, which says where texts stop; got --end-tokens base and eos_token_id=5",
    ),
    "end tokens of a base alone": (
        "calibrate a --base large-base --end-tokens base",
        "--end-tokens: expected an expert and an antiexpert; got --base alone. Name them, or drop --end-tokens.",
    ),
    "an unknown dtype": (f"{GENERATE} hello --dtype fp8", "--dtype: expected 'auto', 'float32', 'bfloat16'"),
    # --- the prompts --------------------------------------------------------------------------------------------------
    "an empty prompt": (f"{GENERATE} ''", "prompt 1: expected some text; got ''. Remove it"),
    "a blank prompt": (f"{GENERATE} Who '  '", "prompt 2: expected some text; got ' '"),
    "a prompt like a setting": (f"{GENERATE} x=5", "'x': expected a field of transformers' GenerationConfig; got x=5."),
    "no such file": (f"{GENERATE} -f promts.txt", "got promts.txt: no such file or directory. Correct the path"),
    "a folder of prompts": (f"{GENERATE} -f kit", "--file: expected a file of prompts that can be read; got kit: is a"),
    "two files": (
        f"{GENERATE} -f blank.txt --file=empty.txt",
        "--file: expected one file; got -f blank.txt and --file=",
    ),
    "an empty file": (f"{GENERATE} -f empty.txt", "prompts from empty.txt: expected at least one line; got nothing"),
    "a blank line": (f"{GENERATE} a -f blank.txt", "blank.txt, line 2: expected some text; got ''"),
    "latin-1": (
        f"{GENERATE} -f latin.txt",
        "got byte 0xf6 at offset 6, in line 2. Convert it, e.g. with iconv -f ISO-8859-1",
    ),
    "UTF-16": (f"{GENERATE} -f wide.txt", "e.g. with iconv -f UTF-16 -t UTF-8 wide.txt > wide.utf8.txt"),
    "a JSON array": (f"{GENERATE} -f array.json", 'got array.json. Write a line {"prompt": "…"} for each prompt'),
    "a table": (f"{SAMPLE} -f table.csv", "or .jsonl, JSON lines; got table.csv. Write a line"),
    "a packed file": (f"{GENERATE} -f packed.jsonl.gz", "or .jsonl, JSON lines; got packed.jsonl.gz. Write a line"),
    "a line that breaks off": (f"{GENERATE} -f cut.jsonl", 'line 2: expected a JSON object; got {"prompt": "b'),
    "an empty line of JSON": (
        f"{GENERATE} -f gap.jsonl",
        "gap.jsonl, line 2: expected a JSON object; got an empty line",
    ),
    "a line that is a list": (f"{GENERATE} -f list.jsonl", 'line 1: expected an object with a string under "prompt"'),
    "text in JSON lines": (f"{GENERATE} -f word.jsonl", "word.jsonl, line 1: expected a JSON object; got hello"),
    "another key": (f"{GENERATE} -f question.jsonl", 'got {"question": "Who?"}. Rename "question" to "prompt".'),
    "a misspelt key": (f"{GENERATE} -f misspelt.jsonl", 'expected the key "prompt"; got "promt". Rename it'),
    "a key in capitals": (f"{GENERATE} -f capital.jsonl", 'expected the key "prompt"; got "Prompt". Rename it'),
    "a number as a prompt": (f"{GENERATE} -f number.jsonl", 'line 1: expected a string under "prompt"; got 3.'),
    "no prompt in a line": (f"{GENERATE} -f null.jsonl", 'line 1: expected a string under "prompt"; got null.'),
    "turns as a prompt": (f"{GENERATE} -f turns.jsonl", 'Correct the line. A conversation stands under "messages".'),
    "a key twice": (f"{GENERATE} -f twice.jsonl", "expected each key once; got 'prompt' twice. Remove one"),
    "two prompts in a line": (f"{GENERATE} -f both.jsonl", 'expected "prompt" or "messages"; got both.'),
    "a key of the output": (f"{GENERATE} -f clash.jsonl", 'expected no "completion", which is a key of the output'),
    "the right answer": (f"{SAMPLE} -f gold.jsonl", 'Rename it, e.g. to "own_answer"; other keys are repeated'),
    "a setting in a line": (f"{GENERATE} -f setting.jsonl", 'expected settings that hold for all prompts; got "temper'),
    "NaN in a line": (
        f"{GENERATE} -f nan.jsonl",
        "nan.jsonl, line 1: expected JSON; got NaN, which is no number there",
    ),
    "half a character": (
        f"{GENERATE} -f half.jsonl",
        "half.jsonl, line 1: expected text; got 'a\\ud83d', with half of a char",
    ),
    # --- conversations ------------------------------------------------------------------------------------------------
    "an answered conversation": (
        f"{GENERATE} -f answered.jsonl",
        'one that ends with {"role": "assistant", "content":',
    ),
    "turns of another form": (f"{GENERATE} -f sharegpt.jsonl", '("from" is "role" here, "value" is "content".)'),
    "another name of messages": (f"{GENERATE} -f conversations.jsonl", 'got "conversations". Rename it to "messages"'),
    "a misspelt role": (f"{GENERATE} -f role.jsonl", 'got {"role": "usr", "content": "Who?"}. Correct the turn.'),
    "a content of parts": (f"{GENERATE} -f parts.jsonl", 'expected turns of the form [{"role": "user", "content": '),
    "a turn without content": (
        f"{GENERATE} -f silent.jsonl",
        'got {"role": "assistant", "content": null}. Correct the turn.',
    ),
    "no turns": (f"{GENERATE} -f nobody.jsonl", 'expected turns under "messages", [{"role": "user", "content": '),
    "lines of two kinds": (
        f"{GENERATE} -f mixed.jsonl",
        "mixed.jsonl, line 2: expected lines of one kind; got a conversation, unlike mixed.jsonl, line 1. Pass --chat",
    ),
    "a system prompt without --chat": (f"{GENERATE} a --system 'Be brief.'", "got 'Be brief.' without it. Add --chat"),
    "a line's system prompt without --chat": (f"{GENERATE} -f system.jsonl", "got 'Be brief.' without it. Add --chat"),
    "two system prompts": (
        f"{GENERATE} -f own-system.jsonl --system 'Be brief.'",
        "expected one system prompt; got --sys",
    ),
    "another name of system": (
        f"{GENERATE} -f system-prompt.jsonl --chat",
        'got "system_prompt". Rename it to "system"',
    ),
    # --- settings -----------------------------------------------------------------------------------------------------
    "a misspelt setting": (f"{GENERATE} a max_new_token=4", "got max_new_token=4. Did you mean max_new_tokens"),
    "a misspelt setting as an option": (f"{GENERATE} a --max-new-token 4", "No such option: --max-new-token"),
    "a misspelt setting with hyphens": (
        f"{GENERATE} a max-new-token=4",
        "got max_new_token=4. Did you mean max_new_tokens",
    ),
    "a setting of other programs": (f"{GENERATE} a max_tokens=4", "Did you mean max_new_tokens"),
    "an option as a setting": (
        f"{GENERATE} a alpha=0.5",
        "It is an option of its own: pass --alpha, before the settings.",
    ),
    "a setting before the prompt": (
        f"{GENERATE} max_new_tokens=4 a",
        "expected the prompts before the settings; got max_n",
    ),
    "a setting twice": (f"{GENERATE} a top_k=1 top_k=2", "'top_k': expected one value; got two, 1 and 2. Remove one"),
    "a setting in two forms": (f"{GENERATE} a top_k=1 --top-k 2", "'top_k': expected one value; got two, 1 and 2."),
    "neither yes nor no": (
        f"{GENERATE} a do_sample=maybe",
        "'do_sample': expected true or false; got 'maybe'. Pass e.g.",
    ),
    "text for a number": (
        f"{GENERATE} a max_new_tokens=many",
        "expected a whole number, at least 1; got 'many'. Correct",
    ),
    "a setting of groups of beams": (
        f"{GENERATE} a num_beams=2 diversity_penalty=0.5",
        "expected a mode that needs no code from the hub; got diversity_penalty=0.5. Leave it out.",
    ),
    "a setting of assistant models": (
        f"{GENERATE} a assistant_confidence_threshold=0.5",
        "expected a setting of the answers; got assistant_confidence_threshold=0.5. Leave it out.",
    ),
    "a stop at nothing": (
        f"{GENERATE} a --stop-strings ''",
        "expected a text, or several as a JSON list; got ''. Leave it out: every text ends with an empty one.",
    ),
    "drafts of no model": (
        f"{GENERATE} a num_assistant_tokens=3",
        "expected a setting of the answers; got num_assistant_tokens=3. Leave it out.",
    ),
    "a setting that transformers has lost": (
        f"{GENERATE} a low_memory=true",
        "expected a setting of the answers; got lo",
    ),
    "no end token": (
        f"{GENERATE} a eos_token_id=-1",
        "a JSON list; got -1. For texts that stop at no token, pass eos_token_id=none.",
    ),
    "a negative token": (f"{GENERATE} a suppress_tokens=[-3]", "expected a list of token ids as JSON; got [-3]."),
    "a negative token of a list": (f"{GENERATE} a bad_words_ids=[[-3]]", "[[5, 6], …], as JSON; got [[-3]]. Correct"),
    "half a token": (f"{GENERATE} a max_new_tokens=4.5", "expected a whole number, at least 1; got 4.5."),
    "no tokens": (f"{GENERATE} a --max-new-tokens 0", "expected a whole number, at least 1; got 0."),
    "temperature 0": (
        f"{GENERATE} a do_sample=true temperature=0",
        "For the likeliest tokens, leave it out, and pass do_",
    ),
    "a negative temperature": (f"{GENERATE} a do_sample=true temperature=-1", "expected a finite number > 0; got -1."),
    "a temperature with a comma": (f"{GENERATE} a do_sample=true temperature=0,7", "a finite number > 0; got '0,7'."),
    "top_p above 1": (f"{GENERATE} a do_sample=on top_p=2", "'top_p': expected a number in (0, 1]; got 2. Correct"),
    "top_p in percent": (f"{SAMPLE} a top_p=90", "'top_p': expected a number in (0, 1]; got 90. Correct"),
    "a negative top_k": (
        f"{GENERATE} a do_sample=yes top_k=-1",
        "'top_k': expected a whole number, at least 0; got -1.",
    ),
    "a repetition penalty of 0": (f"{GENERATE} a repetition_penalty=0", "expected a finite number > 0; got 0."),
    "more at least than at most": (
        f"{GENERATE} a min_new_tokens=9 max_new_tokens=4",
        "min_new_tokens of at most max_new_t",
    ),
    "two limits": (
        f"{GENERATE} a max_length=9 max_new_tokens=4",
        "max_length, which counts the prompt too; got max_length=9",
    ),
    "a number as a stop string": (
        f"{GENERATE} a stop_strings=5",
        "Write it as JSON text, e.g. stop_strings='[\"5\"]'.",
    ),
    "a setting of Python": (
        f"{GENERATE} a compile_config=1",
        "expected a setting of the answers; got compile_config=1.",
    ),
    "a setting without effect": (
        f"{GENERATE} a output_scores=true",
        "expected a setting of the answers; got output_scores",
    ),
    "a mode from the hub": (
        f"{GENERATE} a penalty_alpha=0.6",
        "expected a mode that needs no code from the hub; got pen",
    ),
    # --- the output ---------------------------------------------------------------------------------------------------
    "a folder that is missing": (
        f"{GENERATE} a --out none/out.jsonl",
        "no such file or directory. Make the folder none",
    ),
    "a folder as the output": (
        f"{SAMPLE} a --out kit",
        "--out: expected a file that can be written; got kit: is a directory",
    ),
    "the prompts as the output": (
        f"{GENERATE} -f prompts.txt --out prompts.txt",
        "expected another file than that of the",
    ),
    "somebody's file": (
        f"{GENERATE} a --out foreign.txt",
        "foreign.txt, which holds something else. Choose another file",
    ),
    "somebody's file to resume": (
        f"{SAMPLE} a --out foreign.txt --resume",
        "expected foreign.txt.run.json beside ",
    ),
    "a finished run": (
        f"{GENERATE} a --out done.jsonl",
        "done.jsonl, a finished run of 2 lines. Choose another file; or",
    ),
    "a finished run with a budget": (
        f"{SAMPLE} a b c --budget 40 --out spent.jsonl",
        "spent.jsonl, a finished run of 2 lines. Choose another file; or pass --overwrite to replace it.",
    ),
    "a run with other settings": (
        f"{GENERATE} a b --out done.jsonl --resume --seed 3",
        "--resume with seed: expected 0, with",
    ),
    "a run with other prompts": (
        f"{GENERATE} b a --out done.jsonl --resume max_new_tokens=2",
        'expected an answer to prompt 1, "b"; got one to',
    ),
    "another command's run": (
        f"{SAMPLE} a b --out done.jsonl --resume",
        "--resume with batch_size: expected 8, with which",
    ),
    "resume without a file": (f"{GENERATE} a --resume", "--resume: expected --out with it; got none. Name the file"),
    "stdout as a file": (
        f"{GENERATE} a --out -",
        "--out: expected the name of a file; got '-'. Leave it out: lines go to stdout",
    ),
    "overwrite without a file": (
        f"{SAMPLE} a --overwrite",
        "--overwrite: expected --out with it; got none. Name the file",
    ),
    "resume and overwrite": (
        f"{GENERATE} a --out x --resume --overwrite",
        "--resume: expected no --overwrite; got both.",
    ),
    "a recipe saved to a file": (
        f"{GENERATE} a --save-recipe prompts.txt",
        "got prompts.txt, a file. Choose another folder.",
    ),
    "a recipe saved into a member": (
        f"{GENERATE} a --save-recipe tiny-base",
        "got tiny-base, the folder of a model. Choose",
    ),
    # --- options that do not go together, and out of range ------------------------------------------------------------
    "latent steps of no kind": (
        f"{GENERATE} a --tau 1",
        "--latent: expected a kind, beside its settings; got none, with --tau",
    ),
    "a misspelt kind": (f"{GENERATE} a --latent gumble", "kind: expected 'onehot', 'mean', 'moi', 'gumbel'"),
    "a misspelt setting of a kind": (
        f"{GENERATE} a --latent gumbel:taw=1",
        "got 'taw=1'. Separate several with commas.",
    ),
    "drafts of latent steps": (
        f"{GENERATE} a --speculate --latent mean",
        "--speculate: expected no --latent: drafts are tokens",
    ),
    "no threshold": ("sample --recipe kit a", "got kit, which was not calibrated. Find one with `proxytune calibrate`"),
    "a threshold of another alpha": (
        "sample --recipe calibrated a --alpha 2",
        "--alpha: expected 0.75, at which the recipe's",
    ),
    "a threshold without forks": (f"{SAMPLE} a --threshold 1", "--threshold: expected --forks, or samples that repel"),
    "a threshold that is no number": (
        "sample --recipe kit a --threshold low",
        "valid number, unable to parse string as a n",
    ),
    "a negative threshold": (
        "sample --recipe kit a --threshold -1",
        "--threshold: expected nats, at least 0, as every entropy is; got -1.",
    ),
    "a threshold that nobody reads": (
        "sample --recipe kit a --threshold 1 --where random",
        "--threshold: expected --where forks with it; got --where random. Leave it out",
    ),
    "children of a fork at the start": (
        "sample --recipe kit a --where start --children 3",
        "--children: expected --where forks or random with it; got --where start. Leave it out",
    ),
    "a seed beyond 64 bits": (
        f"{SAMPLE} a --seed 9223372036854775808",
        "seed: expected a whole number of 64 bits, or None; got 9223372036854775808. Pass e.g. --seed 0.",
    ),
    "a negative seed of samples": (
        f"{CALIBRATE} a --seed -1",
        "'--seed': Input should be greater than or equal to 0; got '-1'",
    ),
    "repelling branches": (
        "sample --recipe kit a --threshold 1 --repulsion 1",
        "--repulsion: expected --no-forks with it; got 1",
    ),
    "children without forks": (
        f"{SAMPLE} a --children 3",
        "--children: expected --forks with it; got --no-forks, without",
    ),
    "one child": (
        "sample --recipe kit a --threshold 1 --children 1",
        "Input should be greater than or equal to 2; got '1'",
    ),
    "no budget": (f"{SAMPLE} a --budget 0", "'--budget': Input should be greater than or equal to 1; got '0'"),
    "a negative budget": (
        f"{SAMPLE} a --budget -5",
        "'--budget': Input should be greater than or equal to 1; got '-5'",
    ),
    "an unknown vote": (
        f"{SAMPLE} a --vote best",
        "'best' is not one of 'majority', 'weighted', 'confidence', 'deepconf'",
    ),
    "an eta beyond 100": (
        f"{SAMPLE} a --vote deepconf --eta 110",
        "--eta: expected a percentage in (0, 100]; got 110.",
    ),
    "an eta that nobody reads": (
        f"{SAMPLE} a --eta 50",
        "--eta: expected --vote deepconf with it; got --vote weighted.",
    ),
    "half a pattern": (
        f"{SAMPLE} a --answer '([0-9]+'",
        "--answer: expected a regular expression; got '([0-9]+'. Python says",
    ),
    "a share in percent": (
        f"{CALIBRATE} a --share 20",
        "share: expected a number in (0, 1); got 20.0. Pass e.g. share=0.2",
    ),
    "a share of nothing": (f"{CALIBRATE} a --share 0", "share: expected a number in (0, 1); got 0.0."),
    "samples at temperature 0": (f"{CALIBRATE} a temperature=0", "'temperature': expected a finite number > 0; got 0."),
    "truncated samples": (
        f"{CALIBRATE} a top_k=5",
        "expected max_new_tokens or temperature: entropies are those of the",
    ),
    "a setting of samples twice": (
        f"{CALIBRATE} a --max-new-tokens 5 max_new_tokens=6",
        "expected one value; got two, 5 and 6",
    ),
    "samples of texts": (
        f"{CALIBRATE} --texts prompts.txt --samples 3",
        "--samples: expected prompts with it, to draw samples",
    ),
    "a system prompt of texts": (
        f"{CALIBRATE} --texts prompts.txt --system 'Be brief.'",
        "--system: expected prompts with it, to draw samples from; got --texts alone, which are read as they are.",
    ),
    "conversations as texts": (f"{CALIBRATE} --texts chat.jsonl", 'chat.jsonl, line 1: expected a text under "prompt"'),
    "no such texts": (
        f"{CALIBRATE} --texts none.txt",
        "--texts: expected a file of prompts that can be read; got none.txt:",
    ),
    "a threshold for another alpha": (
        f"{CALIBRATE} a --write --alpha 3",
        "expected the recipe's own α, 0.75: a threshold",
    ),
    "nothing to write into": (
        "calibrate a --base large-base --write",
        "--write: expected --recipe, the recipe to write into",
    ),
    "alpha of a base alone": (
        "calibrate a --base large-base --alpha 1",
        "--alpha: expected an expert and an antiexpert; got",
    ),
    "no problems": ("demo --problems 0", "'--problems': Input should be greater than or equal to 1; got '0'"),
    "no family": ("demo --family none", "'none' does not exist. (see proxytune demo --help)"),
    "a recipe as a family": (
        "demo --family kit",
        "family folder kit: expected a record family.json with the chosen alpha; got none.",
    ),
    "a model as a family": ("bench --family large-base", "family folder large-base: expected one folder per member"),
    "a picture of no kind": ("bench --plot out.txt", "expected a file name that ends in one of eps, jpeg"),
    "a picture in no folder": (
        "bench --plot none/out.png",
        "--plot: expected a folder that exists; got 'none'. Make it first",
    ),
    "no threads": ("bench --threads 0", "'--threads': Input should be greater than or equal to 1; got '0'"),
    "an option that is not there": ("doctor --verbose", "No such option: --verbose (see proxytune doctor --help)"),
}

LOADED = {
    "no such model": (
        "generate hello --base none/none/none --expert tiny-tuned --antiexpert tiny-base",
        "the base: expected a hub id, or a folder with a config.json and weights; got 'none/none/none'",
    ),
    "a folder without a model": (
        "generate hello --base broken --expert tiny-tuned --antiexpert tiny-base",
        "the base: expected a hub id, or a folder with a config.json and weights; got '",
    ),
    "a recipe as a model": (
        "generate hello --base kit --expert tiny-tuned --antiexpert tiny-base",
        "the base: expected a plain model; got a composed one, a ProxyTunedModel of alpha=0.75. Its logits are shifted "
        "already. To decode with it, pass its folder as --recipe; --alpha changes its strength.",
    ),
    "sampling settings without sampling": (
        f"{GENERATE} a temperature=0.7",
        "Greedy decoding would ignore temperature. Add",
    ),
    "sampling settings with do_sample=no": (
        f"{GENERATE} a do_sample=no top_p=0.9",
        "Greedy decoding would ignore top_p.",
    ),
    "beam settings without beams": (
        f"{GENERATE} a length_penalty=2",
        "Without beams, length_penalty would be ignored. Add",
    ),
    "several greedy answers": (
        f"{GENERATE} a num_return_sequences=2",
        "got num_return_sequences=2. Without draws there are no more answers than beams. Add do_sample=true.",
    ),
    "more answers than beams": (
        f"{GENERATE} a num_beams=2 num_return_sequences=3",
        "more answers than beams. Add do_sa",
    ),
    "more at least than the usual most": (
        f"{GENERATE} a min_new_tokens=99",
        "expected min_new_tokens of at most max_new_tokens, which is 64; got min_new_tokens=99. Raise max_new_tokens.",
    ),
    "prompt lookup in a batch": (
        f"{GENERATE} a b prompt_lookup_num_tokens=3",
        "prompt_lookup_num_tokens: expected one prompt per batch: transformers drafts for no more; got 2. Pass",
    ),
    "a token id beyond the vocabulary": (
        f"{GENERATE} a eos_token_id=99999",
        "expected token ids below 564, the size of the",
    ),
    "a setting of prompt lookup": (
        f"{GENERATE} a max_matching_ngram_size=2",
        "Without it, max_matching_ngram_size would be ignored. Add e.g. prompt_lookup_num_tokens=3, or remove",
    ),
    "healing without a first token": (
        f"{GENERATE} a token_healing=true",
        "expected a model with a bos_token_id for token_healing; got token_healing=True. Leave it out, or pass bos",
    ),
    "a banned token beyond the vocabulary": (
        f"{GENERATE} a bad_words_ids=[[5],[6,99999]]",
        "expected token ids below 564, the size of the vocabulary; got bad_words_ids=[[5], [6, 99999]]. Correct bad_wo",
    ),
    "a biased token beyond the vocabulary": (
        f"{GENERATE} a sequence_bias=[[[5,6],-2.0],[[99999],1.0]]",
        "Correct sequence_bias.",
    ),
    "a model without its tokenizer": (
        "calibrate a --base bare",
        "the base's tokenizer: expected tokenizer files beside the base; got none that opens at 'bare'. Save it there",
    ),
    "a model that is not a number": (
        "generate hello --base large-base --expert tiny-tuned --antiexpert nan do_sample=true",
        "in bfloat16 or float32 rather than float16, or pass --remove-invalid-values to go on with finite",
    ),
    "a greedy model that is not a number": (
        "generate hello --base large-base --expert tiny-tuned --antiexpert nan",
        "in bfloat16 or float32 rather than float16. --remove-invalid-values goes on with finite values",
    ),
    "an encoder that reads later tokens": (
        "generate hello --base large-base --expert bert --antiexpert tiny-base",
        "the expert: expected a causal LM, whose results do not depend on later tokens or on its cache; got a Bert",
    ),
    "a reward model": (
        "generate hello --base large-base --expert reward --antiexpert tiny-base",
        "reward', a checkpoint of LlamaForSequenceClassification, which scores texts. Name a causal LM.",
    ),
    "a model without all its weights": (
        "generate hello --base large-base --expert tiny-tuned --antiexpert half",
        "half', a checkpoint of LlamaForCausalLM, without model.norm.weight. transformers would draw these weights",
    ),
    "a call that the template leaves out": (
        f"{GENERATE} -f called.jsonl",
        "called.jsonl, line 1: expected a chat template that writes all turns; got one that leaves out or changes t",
    ),
    "a system prompt that the template refuses": (
        f"{GENERATE} a --chat --system 'Be brief.'",
        "prompt 1: expected turns that the chat template takes; got system, user. It says: expected the",
    ),
    "a span of one part": (
        f"{GENERATE} a --latent mean --latent-span think",
        "--latent-span: expected what opens thinking",
    ),
    "drafts and beams": (f"{GENERATE} a --speculate num_beams=2", "beam search"),
    "a threshold in bits": (
        "sample --recipe kit a --threshold 9",
        "--threshold: expected nats below 6.34, the entropy of a uniform distribution over 564 tokens; got 9. No token",
    ),
    "greedy samples": (
        f"{SAMPLE} a do_sample=off",
        "--no-forks: expected sampling; got do_sample=false. Greedy samples",
    ),
    "beams of a sample": (f"{SAMPLE} a num_beams=2", "SiblingDecoding: expected greedy decoding or sampling; got"),
    "answers per prompt of a sample": (
        f"{SAMPLE} a num_return_sequences=2",
        "num_return_sequences: expected --branches; got",
    ),
    "prompts beyond the context": (
        f"{GENERATE} -f long.jsonl max_new_tokens=2",
        "long.jsonl, line 2: expected at most 512 tokens, the members' context; got 601; also too long: long",
    ),
    "a sample's prompt beyond the context": (
        f"{SAMPLE} -f long.jsonl",
        "long.jsonl, line 2: expected at most 512 tokens",
    ),
    "a text beyond the context": (f"{CALIBRATE} --texts long.jsonl", "long.jsonl, line 2: expected at most 512 tokens"),
    "a prompt as long as everything": (
        f"{GENERATE} 'Who is it?' max_length=2",
        "prompt 1: expected fewer than 2 tokens, max_length, which counts the prompt too; got ",
    ),
    "a budget that is too small": (f"{SAMPLE} 'Question: Who' --budget 1", "prompt 1: expected --budget of at least "),
    "too little to calibrate on": (
        f"{CALIBRATE} a max_new_tokens=3",
        "entropies: expected at least 50 tokens for a share of",
    ),
}

NOTED = {
    "a file's name as a prompt": (
        f"{GENERATE} prompts.txt",
        "'prompts.txt' is taken as a prompt; for the prompts in that",
    ),
    "a file that is not there as a prompt": (
        f"{GENERATE} promts.txt",
        "'promts.txt' is taken as a prompt; there is no file of that name.",
    ),
    "a setting without its sign": (
        f"{GENERATE} max_new_tokens 2 --max-new-tokens 2",
        "'max_new_tokens' is taken as a prompt; for the setting,",
    ),
    "an option without hyphens": (
        f"{GENERATE} alpha",
        "'alpha' is taken as a prompt; for the setting, pass --alpha VALUE.",
    ),
    "a prompt without its quotes": (
        f"{GENERATE} Who is it?",
        "3 prompts of one word each; a text of several words is quoted: 'Who is it?'",
    ),
    "a value of a switch": (
        f"{GENERATE} Who? --do-sample yes",
        "'yes' is taken as a prompt; a switch has no value: --do-sample, --no-do-sample.",
    ),
    "a seed of nothing": (
        f"{GENERATE} a --seed 3",
        "--seed 3 changes nothing: without do_sample=true, no token is drawn.",
    ),
    "a line feed that is none": (
        f"{GENERATE} a --stop-strings '\\n'",
        "in stop_strings is a backslash and a letter; a line feed is written as JSON, stop_strings='[\"\\n\"]'.",
    ),
    "an alpha in percent": (
        f"{GENERATE} a --alpha 1000",
        "alpha=1000 weighs the shift 1000 times: the base hardly counts, and texts are mostly noise. 0.5 to 2 are usua",
    ),
    "expert and antiexpert interchanged": (
        "generate a --base large-base --expert tiny-base --antiexpert tiny-tuned",
        "expert and antiexpert look swapped: the antiexpert is '",
    ),
    "a copy of the antiexpert": (
        "generate a --base large-base --expert copy --antiexpert tiny-base",
        "expert and antiexpert have equal weights, so expert - antiexpert is 0 and only the base is left",
    ),
    "a small base": (
        "generate a --base tiny-base --expert large-tuned --antiexpert large-base",
        "the expert is larger than the base (",
    ),
    "a member without its tokenizer": (
        "generate a --base large-base --expert bare --antiexpert tiny-base",
        "no tokenizer was found for expert. If ids mean different tokens there, the output is noise. Save the tokenize",
    ),
    "other JSON lines in a text file": (
        f"{GENERATE} -f objects.txt",
        'objects.txt holds JSON lines: without "prompt", they are read as text.',
    ),
    "JSON lines in a text file": (
        f"{GENERATE} -f lines.txt",
        'lines.txt holds JSON lines: the "prompt" or "messages" of',
    ),
    "more tokens than the context has": (
        f"{GENERATE} -f tight.txt max_new_tokens=9 max_time=1e-9",
        "tight.txt, line 1: fewer than max_new_tokens=9 tokens are left of the members' context of 512",
    ),
    "an eta as a share": (
        f"{SAMPLE} a --vote deepconf --eta 0.9",
        "--eta 0.9 is in percent: at most one leaf of a hundred",
    ),
    "a budget for some of the samples": (
        f"{SAMPLE} 'Question: Who' --branches 64 --budget 40",
        "--budget 40 has no room",
    ),
}


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture(scope="module")
def place(family, tmp_path_factory):
    """A folder with everything that a call may name, right and wrong."""
    folder = tmp_path_factory.mktemp("place")
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    for member in MEMBERS:
        (folder / member).symlink_to(family / member)
    T5Config(architectures=["T5ForConditionalGeneration"]).save_pretrained(folder / "t5")
    LlavaConfig(architectures=["LlavaForConditionalGeneration"]).save_pretrained(folder / "llava")
    ViTConfig(architectures=["ViTModel"]).save_pretrained(folder / "vit")
    sizes = {"vocab_size": 564, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    BertLMHeadModel(BertConfig(**sizes, num_attention_heads=1)).save_pretrained(folder / "bert")
    for file in (family / "tiny-base").glob("tokenizer*"):
        shutil.copy(file, folder / "bert")
    shutil.copytree(family / "tiny-base", folder / "copy")
    shutil.copytree(family / "tiny-tuned", folder / "bare", ignore=shutil.ignore_patterns("tokenizer*", "chat*"))
    shutil.copytree(folder / "bare", folder / "reward")
    shutil.copytree(folder / "bare", folder / "half")
    shutil.copytree(folder / "copy", folder / "nan")
    weights = load_file(folder / "half" / "model.safetensors")
    save_file(
        {name: tensor * math.nan for name, tensor in weights.items()},
        folder / "nan" / "model.safetensors",
        {"format": "pt"},
    )
    del weights["model.norm.weight"]
    save_file(weights, folder / "half" / "model.safetensors", {"format": "pt"})
    edit(folder / "reward" / "config.json", architectures=["LlamaForSequenceClassification"])
    model = proxytune.wrap(
        str(family / "large-base"), expert=str(family / "tiny-tuned"), antiexpert=str(family / "tiny-base"), alpha=0.75
    )
    for name in ("kit", "calibrated"):
        model.save_pretrained(folder / name)
    write_fork_threshold(folder / "calibrated", ForkCalibration(share=0.2, nats=1.0, tokens=100, alpha=0.75))
    shutil.copytree(folder / "kit", folder / "moved")
    edit(folder / "moved" / "proxytune_config.json", expert={"id": "./gone", "revision": None})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with pytest.raises(SystemExit, match="0"):
            main(shlex.split(f"{GENERATE} a b --out done.jsonl max_new_tokens=2"))
    for name in ("done.jsonl", "done.jsonl.run.json"):
        shutil.copy(folder / name, folder / name.replace("done", "spent"))
    edit(folder / "spent.jsonl.run.json", settings={"budget": 40, "prompts": 2})
    return folder


@pytest.fixture
def there(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    before = {path: path.read_bytes() for path in place.iterdir() if path.is_file()}
    yield place
    assert {path: path.read_bytes() for path in place.iterdir() if path.is_file()} == before, "a file was written"


def is_clear(ended, message):
    """One line that has the message, says more than the name of an exception, and is no traceback."""
    assert ended.code == 2 or (ended.code == 1 and "--budget of at least" in ended.err), ended
    assert re.match(r"error: (?!\w+Error: )", ended.err), ended.err
    assert message in ended.err, ended.err
    assert ended.err.count("\n") == 1, ended.err
    assert ("expected" in ended.err and "; got " in ended.err) or " --help)" in ended.err, ended.err
    assert "traceback" not in ended.err.lower(), ended.err
    assert not PYTHON.search(ended.err), ended.err
    assert ended.out == ""


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_told_before_a_model_is_loaded(run, monkeypatch, kind):
    words, message = MISTAKES[kind]
    if kind == "a GPU for a torch without one":
        for name, value in (("cuda.is_available", lambda: False), ("version.cuda", None), ("version.hip", None)):
            monkeypatch.setattr(f"torch.{name}", value)
    monkeypatch.setattr(proxytune.models.checkpoints, "is_peft_available", lambda: "without peft" not in kind)
    monkeypatch.setattr(proxytune.models.loading, "open_member", None)  # it would be a TypeError, exit code 1
    is_clear(run(*shlex.split(words)), message)


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("kind", LOADED)
def test_a_mistake_is_told_with_the_models_at_hand(run, kind):
    words, message = LOADED[kind]
    is_clear(run(*shlex.split(words)), message)


@pytest.mark.usefixtures("there")
@pytest.mark.filterwarnings("default")  # they are shown, as for a user
@pytest.mark.parametrize("kind", NOTED)
def test_what_is_likely_to_be_a_mistake_has_a_note(run, kind):
    words, message = NOTED[kind]
    ended = run(
        *shlex.split(words), *([] if "max_new_tokens" in words or words.startswith("sample") else ["max_new_tokens=2"])
    )
    assert ended.code == 0, ended
    assert re.match("(note|warning): ", ended.err), ended.err
    assert message in ended.err
    assert not PYTHON.search(ended.err), ended.err


def test_there_are_many():
    assert len(MISTAKES) + len(LOADED) + len(NOTED) >= 200
