"""Transformers' processors for what `families.py` makes: the same pixels and the same prompt ids as ours.

The image processors are those on Pillow (`...Pil`), whose resampling is ours; loaded with the torchvision backend, the
default of transformers 5, single values differ by one level of 256. The chat template is written in Jinja from ours.
"""

import copy
import json
from typing import Any

import transformers
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast, ProcessorMixin

from vlm_lab.convert.families import FAKE, IMAGE, VIDEO, Family
from vlm_lab.convert.parts import only_encoder
from vlm_lab.data.chat import Chat
from vlm_lab.data.tiling import Crop, Native, Pad, Split4
from vlm_lab.model.vlm import VLM


def extended(chat: Chat, family: Family) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """A copy of the tokenizer that knows the class's placeholders, and their ids."""
    tokenizer: Any = copy.deepcopy(chat.tokenizer)
    tokens = [AddedToken(token, special=True, normalized=False) for token in family.tokens]
    tokenizer.add_tokens(tokens, special_tokens=True)
    return tokenizer, tokenizer.convert_tokens_to_ids(list(family.tokens))


def processor(family: Family, vlm: VLM, tiling: Any, chat: Chat, tokenizer: PreTrainedTokenizerFast) -> Any:
    """The class's processor; None if its prompts cannot be ours, whose marker is not Idefics2's token."""
    if isinstance(tiling, Native) and (tiling.marker != FAKE or FAKE not in chat.tokenizer.get_vocab()):
        return None
    _, encoder = only_encoder(vlm, family.name)
    images = image_processor(family, encoder, tiling)
    classed = family.model_type.startswith("llava") and encoder.model.cls_token is not None
    strategy = "default" if classed else "full"
    settings: dict[str, Any] = {"chat_template": jinja(chat)}
    if family.model_type == "idefics2":
        settings["image_seq_len"] = vlm.connector.latents
    elif family.model_type == "llava_onevision":  # "full" whatever the encoder: it counts patches, not tokens
        settings |= {"num_image_tokens": encoder.grid[0] * encoder.grid[1], "vision_feature_select_strategy": "full"}
        settings |= {"video_processor": video_processor(encoder), "vision_aspect_ratio": f"anyres_max_{tiling.cap}"}
    else:
        settings |= {"patch_size": encoder.stride, "vision_feature_select_strategy": strategy}
        settings["num_additional_image_tokens"] = int(classed)
    kind: type[ProcessorMixin] = getattr(transformers, family.name.replace("ForConditionalGeneration", "Processor"))
    return kind(image_processor=images, tokenizer=tokenizer, **settings)


def image_processor(family: Family, encoder: Any, tiling: Any) -> Any:
    side = encoder.image_size
    settings: dict[str, Any] = {"image_mean": list(encoder.mean), "image_std": list(encoder.std)}
    square = {"height": side, "width": side}
    if family.model_type == "idefics2":
        settings["size"] = {"shortest_edge": tiling.shortest, "longest_edge": tiling.longest or side}
        settings["do_image_splitting"] = isinstance(tiling, Split4)
    elif family.model_type == "llava":
        crop = isinstance(tiling, Crop)
        settings |= {"size": {"shortest_edge": side} if crop else square, "crop_size": square}
        settings |= {"do_center_crop": crop, "do_pad": isinstance(tiling, Pad)}
    else:
        settings |= {"size": square, "image_grid_pinpoints": [[r * side, c * side] for r, c in tiling.canvases]}
        settings |= {"crop_size": square} if family.model_type == "llava_next" else {}
    kind = getattr(transformers, family.name.replace("ForConditionalGeneration", "ImageProcessorPil"))
    return kind(**settings)


def video_processor(encoder: Any) -> Any:
    size = {"height": encoder.image_size, "width": encoder.image_size}
    mean, std = list(encoder.mean), list(encoder.std)
    return transformers.LlavaOnevisionVideoProcessor(size=size, image_mean=mean, image_std=std, do_sample_frames=False)


def jinja(chat: Chat) -> str:
    """Our template as the Jinja that `apply_chat_template` reads; placeholders stand where images and videos do."""
    template, text = chat.template, json.dumps
    roles = ("system", "user", "assistant")
    before, after = ({role: getattr(template, role)[side] for role in roles} for side in (0, 1))
    system = f"{before['system']}{chat.system}{after['system']}"
    opening = f"{{% if messages[0]['role'] != 'system' %}}{{{{ {text(system)} }}}}{{% endif %}}" if chat.system else ""
    return (
        f"{{{{ {text(template.start)} }}}}{opening}{{% for message in messages %}}"
        f"{{{{ {text(before)}[message['role']] }}}}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
        f"{{% if part['type'] == 'image' %}}{IMAGE}{{% elif part['type'] == 'video' %}}{VIDEO}"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
        f"{{{{ {text(after)}[message['role']] }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {text(template.assistant[0].rstrip(' '))} }}}}{{% endif %}}"
    )
