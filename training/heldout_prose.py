"""Held-out prose: pages written by hand with questions whose answer is one sentence of the page."""

_Page = tuple[str, list[tuple[str, str]]]

PROSE: list[_Page] = [
    (
        "Welcome to the Lakeside Climbing Hall. Our walls are up to fourteen metres high and have routes for every level. "
        "Beginners have to take part in a safety briefing, which lasts about twenty minutes and begins at every full hour. "
        "Climbing shoes can be hired for 6 francs, harnesses for 4. The hall opens at nine in the morning and the last "
        "climbers must leave by 22:30. A day pass is 24 francs, or 17 francs after six in the evening. Parents remain "
        "responsible for their children throughout the visit. Chalk is welcome as long as it is kept in a ball. Valuables "
        "belong in a locker, because we are not liable for stolen things. If you hurt yourself, tell the person at the "
        "counter at once. Cars can stay in the yard behind the hall for up to four hours.",
        [
            ("How high are the walls?", "Our walls are up to fourteen metres high and have routes for every level."),
            (
                "How long does the safety briefing take?",
                "Beginners have to take part in a safety briefing, which lasts about twenty minutes and begins at every full hour.",
            ),
            ("How much does it cost to hire shoes?", "Climbing shoes can be hired for 6 francs, harnesses for 4."),
            ("What is the price of a day pass?", "A day pass is 24 francs, or 17 francs after six in the evening."),
            ("Where can I park my car?", "Cars can stay in the yard behind the hall for up to four hours."),
            ("What should I do if I get hurt?", "If you hurt yourself, tell the person at the counter at once."),
            ("Is chalk allowed?", "Chalk is welcome as long as it is kept in a ball."),
            (
                "When does the hall open?",
                "The hall opens at nine in the morning and the last climbers must leave by 22:30.",
            ),
        ],
    ),
    (
        "Your cat is going to have its teeth cleaned. Give the last meal at eight in the evening on the day before; water "
        "may stay in the bowl. Come to the practice between 7:45 and 8:15 and bring the vaccination booklet. Dr. Feld will "
        "look at the animal and answer your questions. The cleaning itself takes about an hour, and your cat sleeps all "
        "the while. We call you as soon as it is awake. You can usually take it home at about three in the afternoon. On "
        "the first evening, offer only a small portion of soft food. Some cats are a little unsteady on their legs until "
        "the next morning. Should your cat refuse to drink for a whole day, ring us on 044 208 31 90. The bill of roughly "
        "280 francs is paid when you collect the animal.",
        [
            (
                "When may the cat eat for the last time?",
                "Give the last meal at eight in the evening on the day before; water may stay in the bowl.",
            ),
            (
                "What do I have to bring?",
                "Come to the practice between 7:45 and 8:15 and bring the vaccination booklet.",
            ),
            ("Who examines the animal?", "Dr. Feld will look at the animal and answer your questions."),
            (
                "How long does the cleaning take?",
                "The cleaning itself takes about an hour, and your cat sleeps all the while.",
            ),
            ("When can I take my cat home?", "You can usually take it home at about three in the afternoon."),
            (
                "What food can I offer on the first evening?",
                "On the first evening, offer only a small portion of soft food.",
            ),
            ("How much is the bill?", "The bill of roughly 280 francs is paid when you collect the animal."),
            (
                "What do I do if my cat refuses to drink?",
                "Should your cat refuse to drink for a whole day, ring us on 044 208 31 90.",
            ),
        ],
    ),
    (
        "Community Garden Elmfield\n\nEvery plot measures thirty square metres and is rented for one season. The rent is 95 "
        "pounds and has to be paid before the end of March. New gardeners get their key from Mrs. Adeyemi in the blue hut. "
        "Watering is permitted before ten and after six only, since the well is small. Hoses must not be used; take one of "
        "the cans by the pump.\n\nCompost goes into the three wooden boxes along the wall. Anything that cannot rot has to "
        "be carried home. Dogs stay outside the fence. On the second Saturday of every month all of us work together from "
        "nine to twelve. Whoever cannot come pays fifteen pounds into the common fund. Tools are kept in the shed, whose "
        "code is 4471.",
        [
            ("How big is a plot?", "Every plot measures thirty square metres and is rented for one season."),
            ("By when must the rent be paid?", "The rent is 95 pounds and has to be paid before the end of March."),
            ("Who gives me a key?", "New gardeners get their key from Mrs. Adeyemi in the blue hut."),
            (
                "At what time may I water my plants?",
                "Watering is permitted before ten and after six only, since the well is small.",
            ),
            ("Can I use a hose?", "Hoses must not be used; take one of the cans by the pump."),
            ("Where does compost go?", "Compost goes into the three wooden boxes along the wall."),
            ("Are dogs allowed?", "Dogs stay outside the fence."),
            ("What is the code of the shed?", "Tools are kept in the shed, whose code is 4471."),
            (
                "When do we all work together?",
                "On the second Saturday of every month all of us work together from nine to twelve.",
            ),
        ],
    ),
    (
        "Giving blood at the mobile unit: anybody between 18 and 65 who weighs at least fifty kilos can donate. Eat "
        "something light and drink two glasses of water in the hours before. Have an official photo identification with "
        "you. After the registration, a nurse checks your pulse and the iron in your blood. The donation itself is over in "
        "ten minutes. Then you rest for a quarter of an hour and get a sandwich. Do not lift heavy things with that arm "
        "until the next day. Women may donate three times a year, men four times. If you have been abroad in the past "
        "month, please tell the doctor. The bus stands in front of the fire station on Wednesday from 15:00 to 19:30.",
        [
            (
                "Who can donate blood?",
                "Giving blood at the mobile unit: anybody between 18 and 65 who weighs at least fifty kilos can donate.",
            ),
            ("What should I eat before?", "Eat something light and drink two glasses of water in the hours before."),
            ("Which identification do I need?", "Have an official photo identification with you."),
            ("How long does the donation last?", "The donation itself is over in ten minutes."),
            ("Can I lift heavy things afterwards?", "Do not lift heavy things with that arm until the next day."),
            ("How many times a year may men donate?", "Women may donate three times a year, men four times."),
            (
                "Where does the bus stand?",
                "The bus stands in front of the fire station on Wednesday from 15:00 to 19:30.",
            ),
            (
                "What does the nurse check?",
                "After the registration, a nurse checks your pulse and the iron in your blood.",
            ),
        ],
    ),
    (
        "Dear tenants, from Monday on the lift will be renewed. The work is expected to take five weeks. During this time "
        "only the staircase can be used. Tenants above the fourth floor may ask the caretaker, Mr. Lindqvist, to carry up "
        "their shopping. He is in the house every weekday until 16:00 and answers his telephone on 079 555 61 20. Noise is "
        "to be expected mainly in the morning. The water will be turned off once, on the 14th, between eight and eleven. "
        "Prams and bicycles should be moved from the hall to the cellar. For the inconvenience, the rent of June is "
        "lowered by 60 francs. Parcels are delivered to the bakery across the road.",
        [
            ("How long will the work take?", "The work is expected to take five weeks."),
            (
                "Who can carry up the shopping?",
                "Tenants above the fourth floor may ask the caretaker, Mr. Lindqvist, to carry up their shopping.",
            ),
            (
                "When is the water turned off?",
                "The water will be turned off once, on the 14th, between eight and eleven.",
            ),
            ("Where do bicycles have to go?", "Prams and bicycles should be moved from the hall to the cellar."),
            ("By how much is the rent lowered?", "For the inconvenience, the rent of June is lowered by 60 francs."),
            ("Where are parcels delivered?", "Parcels are delivered to the bakery across the road."),
            ("When must I expect noise?", "Noise is to be expected mainly in the morning."),
        ],
    ),
]
