"""What one image, text, record or request may cost. Each bound stands here once, with its reason."""

# ---------------------------------------------------------------- images
MOST_PIXELS = 89_478_485  # Pillow's own bound, beyond which it suspects a bomb: 360 MB as Pillow holds RGB
THINNEST = 200  # long side over short side, as Qwen2-VL's processor has it; resized to 336 it takes 90 MB
MOST_IMAGE_BYTES = 300 << 20  # of its file: MOST_PIXELS as RGB without compression take 256 MiB

# ---------------------------------------------------------------- records
MOST_RECORD_BYTES = 64 << 20  # as JSON: two large photos in base64 take less
MOST_BENCHMARK_BYTES = 512 << 20  # of one JSON object around all questions: some 2 GB once it is read
MOST_CHARACTERS = 1 << 20  # of a conversation: more tokens than any chat model has positions, in any language
MOST_TURNS = 400  # of a conversation: the chat template is asked once per answer, so time grows with the square

# ---------------------------------------------------------------- what is remembered of them
MOST_KNOWN, LONGEST_KNOWN = 1000, 1000  # texts whose ids are kept, and characters of each: 40 MB at most
MOST_PLANNED = 20_000  # turns of all kinds of conversation whose plan is kept: 20 MB

# ---------------------------------------------------------------- chat templates, which are programs
TEMPLATE_SECONDS = 5  # to write a conversation, which takes a millisecond
TEMPLATE_BYTES = 1 << 30  # of new memory for it: a conversation and its copies take 20 MB

# ---------------------------------------------------------------- requests to the page
MOST_MEGABYTES = 20  # of an image's file
MOST_IMAGES = 8  # in a conversation
MOST_PIXELS_ASKED = 50_000_000  # of each, so that a conversation takes 1.6 GB at most
MOST_NEW_TOKENS = 1024  # in an answer
MOST_EXAMPLES = 12  # on the page
MOST_WAITING = 50  # questions, each with its images in memory
MOST_HELD = 1 << 30  # bytes of all requests together, as they are sent
MOST_SECONDS_TO_SEND = 120  # a request: 80 MB at 5 Mbit/s
