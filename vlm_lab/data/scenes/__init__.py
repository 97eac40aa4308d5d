"""The made-up world `data=scenes`: pictures, captions and questions from a seed, with no download and no torch.

    python -m vlm_lab.data.scenes.sheet /tmp/scenes.png        look at it

world (records) -> compose (what is in a scene) -> draw (pixels); facts, knowledge -> questions; captions;
comparisons (several pictures), clips (videos), documents (articles) -> multi (what a mixture reads of these);
source, pairs, text (what a mixture reads), cache (ready-made pixels), sheet (a page to look at).
"""

from vlm_lab.data.scenes.multi import SceneComparisons, SceneDocuments, SceneVideos
from vlm_lab.data.scenes.pairs import SceneLooks, ScenePairs
from vlm_lab.data.scenes.source import SceneCaptions, SceneQuestions
from vlm_lab.data.scenes.text import SceneText

__all__ = [
    "SceneCaptions",
    "SceneComparisons",
    "SceneDocuments",
    "SceneLooks",
    "ScenePairs",
    "SceneQuestions",
    "SceneText",
    "SceneVideos",
]
