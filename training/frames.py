"""Wordings around the documents: instructions, labels, titles, fillers."""

UNKNOWN = "I don't know. The text does not say."

INSTRUCTIONS = """
Answer the question with the help of the text.
Answer from the text below.
Use the context to answer.
You answer questions about a document.
You are a helpful assistant. Use only the given information.
Reply with the sentence that answers the question.
Answer questions using the notice.
Please answer from the document only.
Use the following pieces of context to answer the question. If you don't know, say so.
You help visitors with their questions. Rely on the text.
Answer briefly and only from the information given.
Find the answer in the text.
Based on the text, answer what the user asks.
The user asks about the following page.
Quote the sentence of the text that answers.
You are an assistant for question answering.
Read the notice and answer.
Stick to the facts in the document.
Look up the answer in the brochure.
Reply using the flyer only.
Give the answer that the page contains.
You work at an information desk. Answer with the help of the sheet.
Use this information when you reply.
Answer the customer's question.
Be short. Use the material provided.
Answer questions about our house.
Only use facts from the text; otherwise say that you don't know.
You are a careful assistant who reads documents.
Help the reader with the document.
Extract the answer from the passage.
Consult the handout to answer.
Answer the question from the document.
Take the answer from the brochure.
Respond to the question with facts from the article.
""".strip().splitlines()

LABELS = [
    f"{name}:{gap}{{text}}"
    for name in [
        "Text",
        "Document",
        "Context",
        "Notice",
        "Information",
        "Leaflet",
        "Page",
        "Brochure",
        "Passage",
        "Note",
        "Flyer",
        "Sheet",
        "Article",
        "Source",
        "Facts",
        "Handout",
        "Excerpt",
        "Message",
        "Content",
        "Background",
    ]
    for gap in ["\n", "\n", " ", "\n\n"]
] + [
    "{text}",
    "{text}",
    "{text}",
    "{text}",
    "<context>\n{text}\n</context>",
    "<document>\n{text}\n</document>",
    "<text>{text}</text>",
    '"""\n{text}\n"""',
    "```\n{text}\n```",
    "---\n{text}\n---",
    "## Context\n{text}",
    "### Text\n{text}",
    "Here is the text:\n{text}",
    "Given this information:\n{text}",
    "[1] {text}",
    "Please read:\n\n{text}",
    "The notice says:\n{text}",
    "context: {text}",
]

QUESTION_LABELS = (
    ["{}"] * 6
    + ["Question: {}"] * 6
    + [
        "Q: {}",
        "Question:\n{}",
        "My question: {}",
        "## Question\n{}",
        "question: {}",
        "Now answer: {}",
        "User question: {}",
        "Question: {}\nAnswer:",
        "Question: {}\n\nAnswer:",
        "Answer this: {}",
        "<question>{}</question>",
    ]
)

ASIDES = [
    "Please tell me, {}",
    "Can you tell me: {}",
    "Hello, {}",
    "I would like to know: {}",
    "Excuse me, {}",
    "Hi! {}",
    "One more thing: {}",
    "And {}",
    "Good morning, {}",
    "Sorry, {}",
    "Thanks. {}",
    "Do you know: {}",
    "Next question: {}",
]

TITLES = [
    "Welcome to {org}",
    "{org} {noun}",
    "Information for guests",
    "{noun}: what you should know",
    "Your {other} in {city}",
    "{adj} {noun}",
    "House rules",
    "About the {other}",
    "Notice",
    "{noun} of {city}",
    "{noun} rules",
    "Important information",
    "{org}: {noun} and {other}",
    "Preparing for your {other}",
    "Frequently asked questions",
    "How to use the {other}",
    "Hints for your {other}",
    "{noun} {city}",
]

FILLERS = """
We are glad that you are here.
Thank you for your interest.
We wish you a pleasant stay.
This page was written for you.
Our team looks forward to meeting you.
Please read the following lines with care.
Every detail counts for us.
Many people have helped to prepare this text.
Your comfort matters to us.
We try to keep everything simple.
Changes are announced in good time.
Thank you very much for your patience.
This sheet answers common questions.
Below you find the most useful facts.
We hope to see you again soon.
Do not hesitate to ask.
We do our best every day.
The following applies to everybody.
Some things have changed since last year.
Safety comes first.
The house has a long tradition.
A few points deserve attention.
Please keep this page in a handy spot.
Here is what matters most.
Dear guests, dear friends.
Thank you for reading.
Kind regards from all of us.
""".strip().splitlines()
