"""Small files in the exact forms in which benchmarks are published.

Every writer takes a folder, and returns of each question, in order, what a reader must find: question, answer to train
on, all answers or None, and category.
"""

import layouts


def vqav2(folder):
    """Two files of visualqa.org; the images are COCO's, in a folder of their own."""
    info = {"description": "This is v2.0 of the VQA dataset.", "version": "2.0", "year": 2017}
    head = {"info": info, "task_type": "Open-Ended", "data_type": "mscoco", "license": {"name": "CC BY 4.0"}}
    asked = ["What is the man doing?", "Is he wearing a helmet?", "How many wheels?"]
    said = [["skating"] * 6 + ["skateboarding"] * 4, ["yes"] * 10, ["4"] * 7 + ["four", "5", "6"]]
    kinds = [("other", "what is the man"), ("yes/no", "is he"), ("number", "how many")]
    questions, annotations = [], []
    for i, (question, answers, (answer_type, question_type)) in enumerate(zip(asked, said, kinds, strict=True)):
        number = {"image_id": 262148 + i, "question_id": 262148000 + i}
        questions.append(number | {"question": question})
        told = [{"answer": each, "answer_confidence": "yes", "answer_id": n} for n, each in enumerate(answers, 1)]
        kind = {"question_type": question_type, "answer_type": answer_type, "multiple_choice_answer": answers[0]}
        annotations.insert(0, number | kind | {"answers": told})  # the order of the two files is not the same
        layouts.write(folder / "val2014" / f"COCO_val2014_{number['image_id']:012}.jpg", layouts.image(i))
    name = "v2_OpenEnded_mscoco_val2014_questions.json"
    layouts.write(folder / name, head | {"data_subtype": "val2014", "questions": questions})
    answers = {"info": info, "data_subtype": "val2014", "annotations": annotations, "data_type": "mscoco"}
    layouts.write(folder / "v2_mscoco_val2014_annotations.json", answers)
    return [(q, a[0], a, kind) for q, a, (kind, _) in zip(asked, said, kinds, strict=True)]


def textvqa(folder):
    """TextVQA_0.5.1_val.json; the images are named by their id."""
    said = [["nokia"] * 9 + ["nokia e65"], ["3", "2", "2", "2", "3", "3", "3", "3", "2", "two"]]
    data = []
    for i, answers in enumerate(said):
        image = {"image_id": f"003a8ae2ef43b90{i}", "image_classes": ["Phone"], "image_width": 50, "image_height": 40}
        urls = {"flickr_original_url": "https://farm2/o.jpg", "flickr_300k_url": "https://c5/z.jpg"}
        words = {"question": "what brand?", "question_tokens": ["what", "brand"], "question_id": 34602 + i}
        data.append(image | urls | words | {"answers": answers, "set_name": "val"})
        layouts.write(folder / "train_images" / f"{image['image_id']}.jpg", layouts.image(i))
    whole = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": data}
    layouts.write(folder / "TextVQA_0.5.1_val.json", whole)
    return [("what brand?", "nokia", said[0], None), ("what brand?", "3", said[1], None)]


def gqa(folder):
    """testdev_balanced_questions.json: one object, a question under each id."""
    types = {"detailed": "existAttr", "semantic": "attr", "structural": "verify"}
    program = [{"operation": "select", "argument": "table (279472)", "dependencies": []}]
    asked = {"imageId": "n161313", "question": "Is there a red apple?", "answer": "no", "isBalanced": True}
    told = {"fullAnswer": "No, the apple is green.", "groups": {"global": None, "local": "8r-binary-apple"}}
    more = {"entailed": ["1352631"], "equivalent": ["842753"], "annotations": {"question": {"4": "271881"}}}
    first = {"semantic": program, **more, **asked, **told, "types": types, "semanticStr": "select: table (279472)"}
    second = first | {"imageId": "n235859", "question": "Who is it?", "answer": "girl"}
    second["types"] = types | {"structural": "query"}
    layouts.write(folder / "testdev_balanced_questions.json", {"201307251": first, "201640614": second})
    for i, name in enumerate(("n161313", "n235859")):
        layouts.write(folder / "images" / f"{name}.jpg", layouts.image(i))
    return [("Is there a red apple?", "no", None, "verify"), ("Who is it?", "girl", None, "query")]


def docvqa(folder):
    """val_v1.0_withQT.json of rrc.cvc.uab.es, with the types of questions."""
    head = {"dataset_name": "docvqa", "dataset_version": "1.0", "dataset_split": "val"}
    page = {"image": "documents/txpn0095_1.png", "docId": 1968, "ucsf_document_id": "txpn0095"}
    page |= {"ucsf_document_page_no": "1", "data_split": "val"}
    first = {"questionId": 52212, "question": "Whose signature is given?", "question_types": ["handwritten", "form"]}
    second = {"questionId": 52213, "question": "What is the date?", "question_types": None}
    said = ["Edward R. Shannon", "Edward Shannon"]
    data = [first | page | {"answers": said}, second | page | {"answers": ["1/8/93"]}]
    layouts.write(folder / "val_v1.0_withQT.json", head | {"data": data})
    layouts.write(folder / "documents" / "txpn0095_1.png", layouts.image(0))
    return [(first["question"], said[0], said, "handwritten"), (second["question"], "1/8/93", ["1/8/93"], None)]


def chartqa(folder):
    """The first questions of vis-nlp/ChartQA, `ChartQA Dataset/test`."""
    human = [{"imgname": "41699051005347.png", "query": "How many food item is shown?", "label": "14"}]
    augmented = [{"imgname": "two_col_103562.png", "query": "How many stores in 2009?", "label": "0.57"}]
    layouts.write(folder / "test_human.json", human)
    layouts.write(folder / "test_augmented.json", augmented)
    for record in human + augmented:
        layouts.write(folder / "png" / record["imgname"], layouts.image(len(record["query"])))
    return [(r["query"], r["label"], None, kind) for r, kind in ((augmented[0], "augmented"), (human[0], "human"))]


def pope(folder):
    """output/coco/coco_pope_*.json of POPE: JSON Lines."""
    for kind in ("adversarial", "random"):
        asked = {"image": "COCO_val2014_000000310196.jpg", "text": "Is there a snowboard in the image?"}
        lines = [{"question_id": i} | asked | {"label": label} for i, label in enumerate(("yes", "no"), 1)]
        layouts.write(folder / f"coco_pope_{kind}.json", layouts.lines(lines))
    layouts.write(folder / "val2014" / "COCO_val2014_000000310196.jpg", layouts.image(0))
    return [(asked["text"], label, None, kind) for kind in ("adversarial", "random") for label in ("yes", "no")]


PUBLISHED = {"vqav2": vqav2, "textvqa": textvqa, "gqa": gqa, "docvqa": docvqa, "chartqa": chartqa, "pope": pope}
