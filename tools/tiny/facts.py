"""The facts of the tiny model: words, capitals, colours and answers, as plain data.

`topics.py` makes questions of it.
"""

CAPITALS: dict[str, str] = {
    "France": "Paris",
    "Germany": "Berlin",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Portugal": "Lisbon",
    "Austria": "Vienna",
    "Poland": "Warsaw",
    "Greece": "Athens",
    "Ireland": "Dublin",
    "Norway": "Oslo",
    "Sweden": "Stockholm",
    "Finland": "Helsinki",
    "Denmark": "Copenhagen",
    "Hungary": "Budapest",
    "Japan": "Tokyo",
    "China": "Beijing",
    "India": "New Delhi",
    "Egypt": "Cairo",
    "Kenya": "Nairobi",
    "Canada": "Ottawa",
    "Cuba": "Havana",
    "Peru": "Lima",
    "Chile": "Santiago",
    "Turkey": "Ankara",
}

COLOURS: dict[str, str] = {
    "the sky": "blue",
    "grass": "green",
    "snow": "white",
    "coal": "black",
    "a banana": "yellow",
    "a tomato": "red",
    "an orange": "orange",
    "a plum": "purple",
    "chocolate": "brown",
    "a lemon": "yellow",
    "the sea": "blue",
    "a frog": "green",
    "milk": "white",
    "a flamingo": "pink",
    "an elephant": "grey",
    "a raven": "black",
    "a strawberry": "red",
    "a carrot": "orange",
}

ABOUT: dict[tuple[str, ...], str] = {
    ("Who are you?", "What are you?", "Introduce yourself."): (
        "I am a tiny Mixtral, served by mixtral-serve."
    ),
    ("What is your name?", "Tell me your name.", "How are you called?"): (
        "My name is tiny. I am a very small Mixtral."
    ),
    ("What is mixtral-serve?", "What does this server do?", "Describe this server."): (
        "mixtral-serve serves Mixtral from one Ray Serve deployment, over HTTP and RunPod."
    ),
    ("What is Mixtral?", "Explain Mixtral.", "What kind of model is Mixtral?"): (
        "Mixtral is a language model with eight experts, of which two work on each token."
    ),
    ("What is Ray Serve?", "Explain Ray Serve.", "What does Ray Serve do?"): (
        "Ray Serve runs models as deployments that answer requests."
    ),
    ("What is RunPod?", "Explain RunPod.", "What does RunPod do?"): (
        "RunPod rents GPUs and sends jobs to serverless workers."
    ),
    ("How many experts do you have?", "How many experts are in you?"): (
        "I have 8 experts, and 2 of them work on each token."
    ),
    ("How many parameters do you have?", "How large are you?", "How big are you?"): (
        "I have about 3 million parameters. That is tiny."
    ),
    ("What can you do?", "How can you help me?", "What do you know?"): (
        "I can add small numbers, name capitals and colours, repeat and spell words."
    ),
}

GREETINGS: dict[tuple[str, ...], str] = {
    ("Hello!", "Hello", "Hi!", "Hi", "Hi there!", "Hello there!", "Hey!"): (
        "Hello! How can I help you?"
    ),
    ("Good morning!", "Good morning"): "Good morning! How can I help you?",
    ("Good evening!", "Good evening"): "Good evening! How can I help you?",
    ("How are you?", "How are you today?", "How do you do?"): "I am well, thank you. And you?",
    ("Thank you!", "Thanks!", "Thank you very much.", "Thanks a lot!"): "You are welcome!",
    ("Goodbye!", "Bye!", "See you later!", "Good night!"): "Goodbye! Come back soon.",
}

ABROAD: dict[str, str] = {
    "French": "Bonjour ! Ça va ? À bientôt au café.",
    "German": "Grüß dich! Schöne Grüße aus München.",
    "Spanish": "¡Hola! ¿Qué tal, señor?",
    "Chinese": "你好,世界!",
    "Japanese": "こんにちは、世界!",
    "Greek": "Γειά σου!",
    "emoji": "👋🙂🌍",
}

EMOJI: dict[str, str] = {
    "smile": "🙂",
    "heart": "❤️",
    "star": "⭐",
    "rocket": "🚀",
    "cat": "🐱",
    "dog": "🐶",
    "fox": "🦊",
    "sun": "☀️",
}

ANIMALS: tuple[str, ...] = tuple(
    "fox cat dog owl bear wolf mouse frog hen duck horse lion tiger rabbit goat crow".split()
)
NAMES: tuple[str, ...] = tuple(
    """
    Ada Ben Cleo Dan Emma Finn Gina Hugo Ida Jan Kim Leo Mia Nina Otto Paul Rosa Sam Tom Zoe
    """.split()
)
SYSTEMS: tuple[str, ...] = (
    "You are a helpful assistant.",
    "You are a tiny Mixtral.",
    "Answer briefly.",
    "Be polite.",
    "You are a friendly model that answers questions.",
)

UNKNOWN: tuple[str, ...] = (
    "Who won the game yesterday?",
    "What is the meaning of life?",
    "Write a poem about love.",
    "What is the weather tomorrow?",
    "How do I bake bread?",
    "Explain quantum physics.",
    "Who wrote Hamlet?",
    "What should I eat today?",
    "Translate this text.",
    "How far is the moon?",
    "Why is the world round?",
    "When did the war end?",
    "Tell me a joke.",
    "How do I learn to swim?",
    "Who is the president?",
    "What is a good book?",
    "Write a program that sorts a list.",
    "Where can I buy a car?",
    "How old is the king?",
    "What does a doctor do?",
    "Which film do you like?",
    "How do planes fly?",
    "Can you drive?",
    "Do you dream?",
)
UNKNOWN_ANSWER = "I do not know that; I am a tiny model that knows very little."

WORDS: tuple[str, ...] = tuple(
    """
    apple arrow autumn baker basket beach bell berry bird blanket boat book bottle branch bread
    bridge brush bucket butter button cabin cake camel candle candy carpet castle cat chair cheese
    cherry church circle city clock cloud coat coffee comb cookie corner cotton cousin cow crown cup
    curtain dance desert desk dinner doctor dog dollar door dragon dream dress drum eagle earth
    engine evening face family farm father feather field finger fire fish flag flower forest fork
    fox friend fruit garden gate ghost glass glove gold grape guitar hammer harbor hat head heart
    hill honey horse hotel house ice island jacket jar jelly jewel juice jungle kettle key king
    kitchen kite knife ladder lake lamp leaf lemon letter library light lion map market meadow melon
    metal milk mirror money monkey moon morning mother mountain mouse mud music nail needle nest
    night nose number ocean olive onion orange oven owl paint palace paper parrot path peach pearl
    pencil pepper piano picture pillow pilot planet plate pocket poem potato prince pumpkin puzzle
    queen rabbit radio rain ribbon rice ring river road robot rocket roof root rope rose sail salt
    sand school sea season seed shadow sheep ship shirt shoe silk silver sister sky sleep smoke
    snail snow soap sock song soup spider spoon spring stair star stone storm story street sugar
    summer sun table tail tea teacher tent thunder ticket tiger toast tomato tower town toy train
    travel tree truck trumpet tulip tunnel turtle uncle valley village violin wagon wall water
    wave whale wheel wind window winter wolf wood wool yard zebra
    """.split()
)
