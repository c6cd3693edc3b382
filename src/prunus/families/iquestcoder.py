"""IQuest-Coder."""

import dataclasses

from prunus.families import llama

FAMILY = dataclasses.replace(llama.FAMILY, model_type="iquestcoder")
