"""How an answer is asked for and given: in a word (`plain`), with a response format (`prompted`), in a `sentence`.

The facts, and the choice among them, are the same in every style. Cambrian-1 (arXiv 2406.16860, section 5.3) found that
questions with short answers make a model answer everything shortly, unless those questions say so: `prompted` does.
"""

from vlm_lab.data.scenes.questions import Question
from vlm_lab.data.scenes.vocabulary import with_article

STYLES = ("plain", "prompted", "sentence")
PROMPT = "Answer with a single word or number."
SENTENCES: dict[str, str] = {
    "shape": "The {color} object is {an_answer}.",
    "color": "The {thing} is {answer}.",
    "count": "I count {answer} {things} in the image.",
    "sum": "{a} plus {b} is {answer}.",
    "difference": "{a} minus {b} is {answer}.",
    "neighbor": "The letter that comes {which} {letter} is {answer}.",
    "category": "{item} is {an_answer}.",
    "sign_text": "The {what} on the {sign} is {answer}.",
    "label_of_bar": "The {which} bar has the label {answer}.",
    "value_of_bar": "The value of {bar} is {answer}.",
    "shape_in_half": "The shape in the {half} half is {an_answer}.",
    "shape_beside": "The shape {side} {b} is {an_answer}.",
    "left_right": "{a} is to the {answer} of {b}.",
    "above_below": "{a} is {answer} {b}.",
    "taller_shorter": "{a} is {answer} than {b}.",
    "closer": "{meant} is closer to {to}.",
    "nearer": "{meant} is {which} the viewer.",
}


def styled(question: Question, style: str) -> tuple[str, str]:
    """(what the user says, what the assistant says). Options are left out of `sentence`, and need no `prompted`."""
    if style == "sentence":
        return question.prompt.partition("\n")[0], sentence(question)
    if style == "prompted" and not question.choices:
        return f"{question.prompt}\n{PROMPT}", question.answer
    return question.prompt, question.answer


def sentence(question: Question) -> str:
    """The answer with what it is an answer to."""
    slots, answer = question.fact.slots, question.fact.answer
    named = [slots[name] for name in ("a", "b") if slots.get(name, "").split(" ")[1:2] == answer.split(" ")[:1]]
    text = SENTENCES[question.template].format(
        **slots, answer=answer, an_answer=with_article(answer), meant=named[0] if named else f"the {answer}"
    )
    return text[0].upper() + text[1:]
